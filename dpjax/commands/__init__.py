"""The commands: one file a verb of `dpjax VERB`, and `cli`, which they share."""
