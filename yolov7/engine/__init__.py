"""What runs a network; its files carry the names of the values of ``--engine``.

- `eager`: PyTorch, on a CPU with `cpu`'s packed convolutions, or compiled, with `winograd`'s.
- `exported`: ONNX Runtime, OpenVINO, torch.export and AOTInductor run a file.
- `graph`: a flat plan over planned buffers, on CUDA one captured graph from frames to boxes.
"""
