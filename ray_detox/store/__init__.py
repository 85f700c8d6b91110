"""Result stores: one protocol (`protocol.py`), SQLite and DynamoDB behind it (`opening.py`)."""
