"""From a page of text to a published book: parameters, fingerprints, execution, the gate, the site."""


class BookError(Exception):
    """Something a person has to change: the message says what was given, what is accepted, and where."""
