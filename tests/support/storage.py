"""Which types of stored weights the installed onnxruntime reads: int2 needs a newer one than Python 3.10 gets."""

from onnx import TensorProto, helper

from jpq.export.onnx.narrow_weights import WEIGHTS
from jpq.export.runtimes import Session
from jpq.types import JpqError


def empty_file(weights):
    """A model of the opset and format of these weights, whose output is its input."""
    opset, ir_version = WEIGHTS[weights]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def is_read(weights):
    """Whether onnxruntime reads files with such weights."""
    try:
        Session(empty_file(weights))
    except JpqError:
        return False
    return True


STORAGES = [name for name in WEIGHTS if is_read(name)]
