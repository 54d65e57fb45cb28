"""Published archives and folders of images become TFDS data sets."""
