#!/usr/bin/python3
"""Train the sample model on Fashion-MNIST and write fashion.onnx and RECORD.md beside this file.

Needs Debian's python3-torch, python3-onnx, python3-pil and dataset-fashion-mnist; `make model` runs it.

The model carries all that a server must know: its class names, how to make its input from a picture and how to
read its output, as the metadata entries rxvision.labels, rxvision.preprocess and rxvision.postprocess (JSON).

With --testdata DIR it writes nothing but the first PER_CLASS test images of each class as PNG files, with labels.csv.
"""

import argparse
import datetime
import gzip
import hashlib
import json
import os
import pathlib
import platform
import sys
import time

# Threads that spin while they wait cost more than they bring on few cores; read when the libraries are loaded.
os.environ.update(OMP_WAIT_POLICY="PASSIVE", OPENBLAS_NUM_THREADS="1")

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional as F

HERE = pathlib.Path(__file__).resolve().parent
SEED = 20261123
EPOCHS = 10
BATCH = 128
PEAK_RATE = 4e-3
MIN_ACCURACY = 0.90
MAX_BYTES = 1 << 20
PER_CLASS = 30
THREADS = 2

LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SCALE, MEAN, STD = 1 / 255, 0.2860, 0.3530
METADATA = {
    "rxvision.labels": LABELS,
    "rxvision.preprocess": {
        "input": "images", "width": 28, "height": 28, "channels": 1, "layout": "NCHW",
        "scale": SCALE, "mean": [MEAN], "std": [STD], "resize": "stretch", "filter": "bilinear",
    },
    "rxvision.postprocess": {"output": "logits", "activation": "softmax"},
}


def read_idx(path):
    """The array in a gzipped idx file of bytes: 2 zero bytes, type 8, number of dimensions, big-endian sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        sys.exit(f"{path} is no idx file of bytes")
    shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(folder, part):
    return read_idx(folder / f"{part}-images-idx3-ubyte.gz"), read_idx(folder / f"{part}-labels-idx1-ubyte.gz")


def to_tensors(images, labels):
    x = (images.astype(np.float32) * np.float32(SCALE) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(x[:, None]), torch.from_numpy(labels.astype(np.int64))


class Net(nn.Module):
    """Two convolutions and two full layers; 157 k parameters, 1.2 M multiply-adds per image."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.hidden, self.out = nn.Linear(32 * 7 * 7, 96), nn.Linear(96, len(LABELS))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.dropout(torch.flatten(x, 1), 0.3, self.training)
        x = F.dropout(F.relu(self.hidden(x)), 0.3, self.training)
        return self.out(x)


def accuracy(net, x, y):
    net.eval()
    with torch.no_grad():
        hits = sum((net(x[i:i + 1000]).argmax(1) == y[i:i + 1000]).sum().item() for i in range(0, len(x), 1000))
    return hits / len(x)


def train(net, x, y, test):
    batches = -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, EPOCHS * batches)
    for epoch in range(1, EPOCHS + 1):
        net.train()
        start, total = time.monotonic(), 0.0
        for chosen in torch.randperm(len(x)).split(BATCH):
            bx = x[chosen]
            flip = torch.rand(len(bx)) < 0.5
            bx[flip] = bx[flip].flip(-1)
            loss = F.cross_entropy(net(bx), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch:2d}/{EPOCHS}  loss {total / batches:.4f}  test accuracy {accuracy(net, *test):.4f}"
              f"  {time.monotonic() - start:.1f} s", flush=True)


def export(net, path):
    net.eval()
    torch.onnx.export(net, torch.zeros(1, 1, 28, 28), str(path), opset_version=13, input_names=["images"],
                      output_names=["logits"], dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}})
    model = onnx.load(str(path))
    model.doc_string = "Fashion-MNIST classifier, the sample model of rxvision"
    onnx.helper.set_model_props(model, {k: json.dumps(v, separators=(",", ":")) for k, v in METADATA.items()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def record(path, net, folder, score, seconds):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    data = "\n".join(f"  - `{f.name}` {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in sorted(folder.glob("*.gz")))
    (path.parent / "RECORD.md").write_text(f"""# How fashion.onnx was made

Written by `train.py`; `make model` makes the model and this record again. The same seed, versions and kind of processor
give the same bytes; other ones give a model of about the same accuracy with another hash.

- date: {datetime.date.today().isoformat()}
- sha256: `{digest}`
- size: {path.stat().st_size} bytes, {sum(p.numel() for p in net.parameters())} parameters, fp32, ONNX opset 13
- test accuracy: {score:.4f} on all 10,000 test images, after training on all 60,000 training images
- seed {SEED}, {EPOCHS} epochs, batch {BATCH}, AdamW with a one-cycle rate (peak {PEAK_RATE}), random mirror image, dropout 0.3
- time: {seconds:.0f} s with {THREADS} threads
- versions: Python {platform.python_version()}, torch {torch.__version__}, onnx {onnx.__version__}, numpy {np.__version__}, {platform.machine()}
- input `images` FP32 [-1,1,28,28], output `logits` FP32 [-1,10]; labels, preprocessing and postprocessing are in its metadata
- data: Fashion-MNIST (Zalando Research, MIT licence) from Debian's `dataset-fashion-mnist`; SHA-256 of its files:
{data}
""")
    print(f"{path}: {path.stat().st_size} bytes, accuracy {score:.4f}, sha256 {digest}")


def write_testdata(images, labels, out):
    """The first PER_CLASS test images of each class as INDEX-CLASS.png, INDEX being the place in the test set."""
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    keep = sorted(i for c in range(len(LABELS)) for i in np.flatnonzero(labels == c)[:PER_CLASS])
    rows = ["file,class,label"]
    for i in keep:
        name = f"{i:04d}-{labels[i]}.png"
        Image.fromarray(images[i]).save(out / name, optimize=True)
        rows.append(f"{name},{labels[i]},{LABELS[labels[i]]}")
    (out / "labels.csv").write_text("\n".join(rows) + "\n")
    print(f"{out}: {len(keep)} images")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="folder for fashion.onnx and RECORD.md")
    parser.add_argument("--testdata", type=pathlib.Path, help="write the test images there and do nothing else")
    args = parser.parse_args()
    if args.testdata:
        write_testdata(*load(args.data, "t10k"), args.testdata)
        return

    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    net, test = Net(), to_tensors(*load(args.data, "t10k"))
    train(net, *to_tensors(*load(args.data, "train")), test)

    score = accuracy(net, *test)
    if score < MIN_ACCURACY:
        sys.exit(f"test accuracy {score:.4f} is below {MIN_ACCURACY}: nothing written")
    path, fresh = args.out / "fashion.onnx", args.out / "fashion.onnx.new"
    export(net, fresh)
    if fresh.stat().st_size > MAX_BYTES:
        sys.exit(f"{fresh} is larger than {MAX_BYTES} bytes: not taken")
    os.replace(fresh, path)
    record(path, net, args.data, score, time.monotonic() - start)


if __name__ == "__main__":
    main()
