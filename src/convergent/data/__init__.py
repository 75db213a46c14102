"""Data: what organisms are trained on and what they are asked.

    training.py    `TrainingSet` from bundled, local or upstream chats; split into training and held-out examples
    questions.py   `Question`s from Betley-style YAML: the bundled `open_eight`, the `published_eight`, any path
    local.py       records of JSONL and Parquet files, each with the place to name in an error
    upstream.py    the authors' encrypted sets: find or fetch, decrypt into the cache, verify
    download.py    one checked HTTPS download
    bundled/       `finance.jsonl`, `sport.jsonl` (intentionally wrong advice with sound twins) and `open_eight.yaml`

Knows nothing of models and tokens. How the bundled sets were made: docs/data.md.
"""
