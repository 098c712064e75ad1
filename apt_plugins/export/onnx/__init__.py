"""``exporter:onnx``: two graphs for ONNX Runtime, with caches and without."""
