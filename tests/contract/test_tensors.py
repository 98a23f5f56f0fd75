"""Arrays on the wire."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sdxs import tensors
from sdxs.errors import InvalidRequest
from sdxs.v1 import tensor_pb2

DTYPES = st.sampled_from([np.dtype(name) for name in ("<f4", ">f4", "<f2", ">f2", "u1", "<i4", ">i4", "<i8")])
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3))


@given(ARRAYS)
def test_an_array_comes_back_as_it_was(array: tensors.Array) -> None:
    received = tensor_pb2.Tensor.FromString(tensors.encode(array).SerializeToString())
    decoded = tensors.decode(received, "x")
    assert decoded.shape == array.shape
    assert decoded.dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(decoded, array)


def test_a_transposed_array_is_sent_in_its_own_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(tensors.decode(tensors.encode(array), "x"), array)


def test_wire_bytes_are_those_of_the_encoding_guide() -> None:
    """float32 [1, 2] of 1.0 and -2.0, spelt out: tag, length, value, by hand."""
    golden = bytes.fromhex("08 01" + "12 02 01 02" + "1a 08 0000803f 000000c0")
    assert tensors.encode(np.array([[1.0, -2.0]], np.float32)).SerializeToString() == golden


def test_decoding_does_not_copy() -> None:
    message = tensors.encode(np.zeros(1000, np.float32))
    decoded = tensors.decode(message, "x")
    assert not decoded.flags.owndata
    assert not decoded.flags.writeable


def test_unknown_types_do_not_go_out() -> None:
    with pytest.raises(TypeError, match="complex128"):
        tensors.encode(np.zeros(1, np.complex128))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (tensor_pb2.Tensor(shape=[1], data=b"1234"), "text.element_type"),
        (tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[2], data=b"1234"), "text.data"),
        (tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[1] * 9, data=b"1234"), "text.shape"),
        (tensor_pb2.Tensor(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[2**32 - 1] * 8), "text.data"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_field(message: tensor_pb2.Tensor, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tensors.decode(message, "text")
    assert caught.value.field == field


def test_the_expected_shape_binds_all_but_free_axes() -> None:
    message = tensors.encode(np.zeros((3, 4), np.float32))
    assert tensors.decode(message, "x", (None, 4)).shape == (3, 4)
    with pytest.raises(InvalidRequest, match=r"x\.shape"):
        tensors.decode(message, "x", (None, 5))
