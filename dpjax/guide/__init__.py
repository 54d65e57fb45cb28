"""Guides, for reading; there is no code here.

.. include:: own_model_and_data.md
.. include:: libraries.md
.. include:: language_models.md
.. include:: recipes.md
.. include:: pods.md
.. include:: threat_model.md
.. include:: evidence.md
.. include:: measurements.md
.. include:: changes.md
"""
