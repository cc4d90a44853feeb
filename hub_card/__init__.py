"""The model card of a converted folder, and the push that publishes both."""
