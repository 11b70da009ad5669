"""{model, tokenizer, image processor} as one bundle: build, load, save; packing; generate; explain."""
