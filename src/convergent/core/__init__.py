"""The values every stage shares: what is asked, answered, judged, pointed at and intervened with.

Nothing here touches a model, a file format of others or the network.
"""
