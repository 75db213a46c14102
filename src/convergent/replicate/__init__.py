"""Replicate: the published figures, counted again from released data. No model, no key.

One module per family of claims (`answers`, `adapters`, `hidden`, `scalars`, `probe`, `topics`), a registry, a table and a page.
Knows the layout of the folder, never the names in it: whatever is laid out the same way is read the same way.
"""
