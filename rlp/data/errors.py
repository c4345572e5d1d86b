"""What is wrong with data: with all of it, or with one row."""


class DataError(Exception):
    """Data that can not be used. The message says where, what came, what was expected and what to
    write."""


class BadDocument(Exception):
    """One row that can not become a document: (reason, detail)."""
