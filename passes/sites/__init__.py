"""One file a kind of site that is found in a captured graph, beside those that `peftc.roles` finds."""
