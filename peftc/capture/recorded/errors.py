"""What a record cannot hold, or does not fit: then the model is captured."""


class NotRecordedError(Exception):
    """Something of a model or of its graph that no record is made of."""
