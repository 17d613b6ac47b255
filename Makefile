.PHONY: ort
ort: ## get the pinned ONNX Runtime library into out/lib
	@tools/onnxruntime/get.sh out/lib
