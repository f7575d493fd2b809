"""From result files to what people read: tables (`tables.py`), figures (`figures.py`), pages (`page.py`)."""
