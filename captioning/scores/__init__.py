"""{id: caption}, {id: [references]} -> scores. Plain strings; no torch."""
