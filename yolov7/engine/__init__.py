"""What runs a network; its files carry the names of the values of ``--engine``.

- `choose`: the door: which engine runs these weights here. `frames`: from frames to boxes.
- `eager`: PyTorch, on a CPU with `cpu`'s packed convolutions. `compile`: with `winograd`'s.
- `exported`: ONNX Runtime, OpenVINO, torch.export and AOTInductor run a file.
- `graph`: a flat plan over planned buffers, on CUDA one captured graph from frames to boxes.
- `faults`: what a failing compiler, driver or device comes to.
"""
