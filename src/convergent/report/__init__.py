"""The report: one self-contained page, and the same numbers as CSV and Parquet.

`results.Results` is all the page knows; `page.write_report` turns it into files. Nothing here reads a store or a model.
"""
