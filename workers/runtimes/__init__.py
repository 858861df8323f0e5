"""torch, ONNX Runtime, OpenVINO and TensorRT, and the artefacts they load."""
