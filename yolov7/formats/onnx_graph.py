"""ONNX graphs: the network as torch.onnx makes it, letterbox before and suppression after it.

The parts around the network are written in ONNX's own text form, with standard operators only. They
have what PyTorch cannot export: an image of any size, and a number of detections that depends on
what is in it.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from string import Template

import onnx.compose
import onnx.version_converter
import torch
from onnx import GraphProto, ModelProto, ValueInfoProto, helper, parser
from torch.export import ExportedProgram

from yolov7.errors import UserError
from yolov7.formats.metadata import Metadata
from yolov7.formats.onnx import OPSET
from yolov7.kernels.nms.reference import CLASS_OFFSET
from yolov7.letterbox import GREY

OLD_IR = 8  # of files, as old as the operators
DECODED = "decoded"  # the network's output, where something comes after it
THRESHOLD = "suppress/score_threshold"  # the constant below which nothing is a detection

# ratio = the smaller of limit / size; new size = round(size ratio), at least 1; half of the rest,
# rounded down, goes before the image. Sizes are (height, width).
LETTERBOX = """
letterbox (uint8[height, width, 3] image) =>
 (float[1, 3, $HEIGHT, $WIDTH] images, float ratio_float, float[2] pad_xy, float[2] source_xy)
<int64[2] limit = {$HEIGHT, $WIDTH}, double pad_share = {0.5}, int64[2] one = {1, 1},
 int64[1] first = {0}, int64[2] two = {2, 2}, int64[3] rgb = {2, 1, 0}, int64[2] batch = {1, 3},
 int64[2] none = {0, 0}, float grey = {$GREY}, float white = {255.0},
 int64[4] shape = {1, 3, $HEIGHT, $WIDTH}, int64[2] xy = {1, 0}>
{
  source = Shape<start = 0, end = 2>(image)
  source_double = Cast<to = 11>(source)
  limit_double = Cast<to = 11>(limit)
  ratios = Div(limit_double, source_double)
  ratio = ReduceMin(ratios)
  exact = Mul(source_double, ratio)
  rounded = Round(exact)
  whole = Cast<to = 7>(rounded)
  size = Max(whole, one)
  rest = Sub(limit, size)
  before = Div(rest, two)
  after = Sub(rest, before)

  pixels = Cast<to = 1>(image)
  planes = Transpose<perm = [2, 0, 1]>(pixels)
  ordered = Gather<axis = 0>(planes, rgb)
  stacked = Unsqueeze(ordered, first)
  sizes = Concat<axis = 0>(batch, size)
  scaled = Resize<mode = "linear", coordinate_transformation_mode = "half_pixel">
    (stacked, , , sizes)
  pads = Concat<axis = 0>(none, before, none, after)
  canvas = Pad(scaled, pads, grey)
  fixed = Reshape(canvas, shape)
  images = Div(fixed, white)

  ratio_float = Cast<to = 1>(ratio)
  source_float = Cast<to = 1>(source)
  source_xy = Gather<axis = 0>(source_float, xy)
  rest_double = Cast<to = 11>(rest)
  half_rest = Mul(rest_double, pad_share)
  half_float = Cast<to = 1>(half_rest)
  pad_xy = Gather<axis = 0>(half_float, xy)
}
"""

# Boxes of different classes are moved apart, as our own suppression does, by no less than the side
# of an image that `export` takes, so that one suppression per image serves all classes and its
# limit holds for all of them together; TopK sorts what is left and fills up to max_det.
SUPPRESS = """
suppress (float[$BATCH, N, C] decoded) =>
 (float[$BATCH, $MAX_DET, 6] $OUT, int32[$BATCH] counts)
<int64[4] parts = {2, 2, 1, $CLASSES}, float half = {0.5}, float offset = {$OFFSET},
 int64[1] last = {-1}, int64[1] middle = {1}, int64[2] image_box = {0, 2}, int64[1] keep = {$KEEP},
 int64 max_det = {$MAX_DET}, float iou_threshold = {$IOU}, float score_threshold = {$CONF},
 float nothing = {0.0}, int64[6] fill = {0, 0, 0, 0, $FILL, 0}>
{
  centre, extent, objectness, classes = Split<axis = 2>(decoded, parts)
  half_extent = Mul(extent, half)
  top_left = Sub(centre, half_extent)
  bottom_right = Add(centre, half_extent)
  boxes = Concat<axis = 2>(top_left, bottom_right)
  products = $SCORE
  score = ReduceMax<keepdims = 1>(products, last)
  number = ArgMax<axis = 2, keepdims = 1>(products)
  label = Cast<to = 1>(number)
  rows = Concat<axis = 2>(boxes, score, label)

  offsets = Mul(label, offset)
  apart = Add(boxes, offsets)
  score_rows = Transpose<perm = [0, 2, 1]>(score)
  chosen = NonMaxSuppression(apart, score_rows, max_det, iou_threshold, score_threshold)
  places = Gather<axis = 1>(chosen, image_box)

  scores = Squeeze(score, last)
  shape = Shape(scores)
  blank = ConstantOfShape(shape)
  chosen_scores = GatherND(scores, places)
  kept = ScatterND(blank, places, chosen_scores)
  best, order = TopK<axis = 1>(kept, keep)
  index = Unsqueeze(order, last)
  sorted = GatherND<batch_dims = 1>(rows, index)
  present = Greater(best, nothing)
  present_rows = Unsqueeze(present, last)
  found = Where(present_rows, sorted, nothing)
  $OUT = Pad(found, fill, nothing)
  ones = Cast<to = 6>(present)
  counts = ReduceSum<keepdims = 0>(ones, middle)
}
"""

# From pixels of the letterbox to pixels of the image that it was made from.
RESTORE = {
    "grid": """
restore (float[1, N, C] $IN, float ratio_float, float[2] pad_xy, float[2] source_xy) =>
 (float[1, $ROWS, $COLUMNS] predictions)
<int64[3] parts = {2, 2, $REST}>
{
  centre, extent, others = Split<axis = 2>($IN, parts)
  moved = Sub(centre, pad_xy)
  centre_out = Div(moved, ratio_float)
  extent_out = Div(extent, ratio_float)
  predictions = Concat<axis = 2>(centre_out, extent_out, others)
}
""",
    "classes-first": """
restore (float[1, C, N] $IN, float ratio_float, float[2] pad_xy, float[2] source_xy) =>
 (float[1, $ROWS, $COLUMNS] predictions)
<int64[3] parts = {2, 2, $REST}, int64[2] column = {2, 1}>
{
  centre, extent, others = Split<axis = 1>($IN, parts)
  pad_column = Reshape(pad_xy, column)
  moved = Sub(centre, pad_column)
  centre_out = Div(moved, ratio_float)
  extent_out = Div(extent, ratio_float)
  predictions = Concat<axis = 1>(centre_out, extent_out, others)
}
""",
    "detections": """
restore (float[1, N, C] $IN, float ratio_float, float[2] pad_xy, float[2] source_xy) =>
 (float[1, $ROWS, $COLUMNS] detections)
<int64[3] parts = {2, 2, $REST}, float origin = {0.0}>
{
  first_corner, second_corner, others = Split<axis = 2>($IN, parts)
  first_moved = Sub(first_corner, pad_xy)
  second_moved = Sub(second_corner, pad_xy)
  first_scaled = Div(first_moved, ratio_float)
  second_scaled = Div(second_moved, ratio_float)
  first_low = Max(first_scaled, origin)
  second_low = Max(second_scaled, origin)
  first_out = Min(first_low, source_xy)
  second_out = Min(second_low, source_xy)
  detections = Concat<axis = 2>(first_out, second_out, others)
}
""",
}


def build_onnx(program: ExportedProgram, metadata: Metadata, opset: int) -> ModelProto:
    """The whole graph, with its metadata.

    Args:
        program: The network: images [B, 3, h, w] to predictions in the metadata's layout, or in
            "grid" where suppression follows.
        metadata: What to build around it, and to write into it.
        opset: Version of the operators.
    """
    alone = metadata.nms is None and not metadata.letterbox
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=max(opset, OPSET),
            input_names=["images"],
            output_names=["predictions" if alone else DECODED],
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    if opset < OPSET:  # which PyTorch does not write
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except RuntimeError as error:
            why = str(error).rpartition(": ")[2]
            raise UserError(f"opset {opset}: not for this graph ({why}): leave it out") from None
        model.ir_version = OLD_IR
    _strip(model)
    model.graph.name = metadata.variant
    if metadata.letterbox:
        height, width = metadata.imgsz
        _prepend(model, LETTERBOX, HEIGHT=height, WIDTH=width, GREY=float(GREY))
    if metadata.nms is not None:
        _append(model, SUPPRESS, **_suppress_values(model, metadata))
    if metadata.letterbox:
        source = model.graph.output[0]
        rows, columns = (d.dim_value for d in source.type.tensor_type.shape.dim[1:])
        channels = rows if metadata.layout == "classes-first" else columns
        values = {"IN": source.name, "ROWS": rows, "COLUMNS": columns, "REST": channels - 4}
        _append(model, RESTORE[metadata.layout], **values)
    for key, text in metadata.to_text().items():
        model.metadata_props.add(key=key, value=text)
    onnx.checker.check_model(model, full_check=True)
    return model


def expose(model: ModelProto, threshold: float) -> bytes:
    """The graph of `model` with its network's output as one more output, and a lower threshold."""
    changed = ModelProto()
    changed.CopyFrom(model)
    changed.graph.output.append(
        helper.make_tensor_value_info(DECODED, onnx.TensorProto.FLOAT, None)
    )
    for constant in changed.graph.initializer:
        if constant.name == THRESHOLD:
            constant.float_data[:] = [threshold]
    return changed.SerializeToString()


def _suppress_values(model: ModelProto, metadata: Metadata) -> dict[str, object]:
    nms = metadata.nms
    assert nms is not None
    (output,) = model.graph.output
    predictions = output.type.tensor_type.shape.dim[1].dim_value
    keep, one_class = min(nms.max_det, predictions), len(metadata.names) == 1
    return {
        "BATCH": "batch" if metadata.batch == "dynamic" else metadata.batch,
        "OUT": "letterboxed" if metadata.letterbox else "detections",
        "CLASSES": len(metadata.names),
        "SCORE": "Identity(objectness)" if one_class else "Mul(classes, objectness)",
        "OFFSET": CLASS_OFFSET,
        "CONF": float(nms.conf),
        "IOU": float(nms.iou),
        "MAX_DET": nms.max_det,
        "KEEP": keep,
        "FILL": nms.max_det - keep,
    }


def _parsed(text: str, values: dict[str, object]) -> GraphProto:
    """The graph of a text, with its name before those of its inner values and constants."""
    graph = parser.parse_graph(Template(text).substitute(values))
    onnx.compose.add_prefix_graph(
        graph, f"{graph.name}/", inplace=True, rename_inputs=False, rename_outputs=False
    )
    return graph


def _prepend(model: ModelProto, text: str, **values: object) -> None:
    """Put the operators of `text` before the graph, and its input in the place of the graph's."""
    part = _parsed(text, values)
    nodes = [*part.node, *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(part.initializer)
    model.graph.input.extend(part.input)


def _append(model: ModelProto, text: str, **values: object) -> None:
    """Put the operators of `text` after the graph; its outputs take the place of their inputs."""
    part = _parsed(text, values)
    consumed = {value.name for value in part.input}
    outputs = [*part.output, *(o for o in model.graph.output if o.name not in consumed)]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    model.graph.node.extend(part.node)
    model.graph.initializer.extend(part.initializer)


def _strip(model: ModelProto) -> None:
    """Take out what tells of the exporting machine, and call the free dimension "batch"."""
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    model.doc_string = graph.doc_string = ""
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for constant in graph.initializer:
        constant.doc_string = ""
        del constant.metadata_props[:]
    for value in (*graph.input, *graph.output):
        _name_batch(value)


def _name_batch(value: ValueInfoProto) -> None:
    del value.metadata_props[:]
    first = value.type.tensor_type.shape.dim[0]
    if first.dim_param:
        first.dim_param = "batch"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings from the user, who can do nothing about them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
