"""Ops that move or fill memory and compute nothing, and those that do not even that."""

from __future__ import annotations

from bursar.rules import Op, Work, rule

# Views and bare allocations: the only ops that cost nothing. Views share their input's storage; the rest name memory
# without touching it. A test holds the views against torch's own schemas.
FREE = frozenset(
    """
    aten.alias aten.as_strided aten.chunk aten.detach aten.detach_ aten.diagonal aten.expand aten.lift aten.lift_fresh
    aten.movedim aten.narrow aten.permute aten.select aten.slice aten.split aten.split_with_sizes aten.squeeze
    aten.as_strided_ aten.squeeze_ aten.t aten.t_ aten.transpose aten.transpose_ aten.unbind aten.unfold aten.unsqueeze
    aten.unsqueeze_ aten.view aten._unsafe_view aten._reshape_alias aten.view_as_real aten.view_as_complex
    aten.unsafe_split
    aten.unsafe_chunk aten.unsafe_split_with_sizes aten._conj aten._neg_view aten.real aten.imag
    aten._shape_as_tensor aten.is_same_size aten._version aten.set_ aten.resize_ aten.record_stream
    aten.empty aten.empty_like aten.empty_strided aten.empty_permuted aten.new_empty aten.new_empty_strided
    aten._local_scalar_dense aten.sym_size aten.sym_stride aten.sym_numel aten.sym_storage_offset aten.is_nonzero
    aten._nested_tensor_size aten.requires_grad_ aten.swapaxes aten.expand_as aten.view_as
    aten._has_compatible_shallow_copy_type aten.resize_as_ aten._linalg_check_errors aten._assert_async
    aten._functional_assert_async aten._assert_scalar aten._sparse_coo_tensor_with_dims_and_tensors
    aten._efficientzerotensor aten._indices aten._values aten.is_coalesced aten._coalesced_ aten._nnz
    aten.sparse_dim aten.dense_dim aten._sparse_coo_tensor_unsafe aten._sparse_compressed_tensor_unsafe
    aten.sparse_compressed_tensor aten._has_same_storage_numel
    """.split()
)

# In place, but what stood there is not read
WRITE_ONLY = frozenset(
    """
    aten.copy_ aten.zero_ aten.fill_ aten._foreach_zero_ aten._foreach_copy_ aten.normal_ aten.uniform_ aten.random_
    aten.bernoulli_ aten.exponential_ aten.log_normal_ aten.cauchy_ aten.geometric_ aten.eye_
    """.split()
)


@rule("aten._to_copy", "aten.clone", "aten.cat", "aten.stack", "aten.repeat", "aten.constant_pad_nd", "aten.flip",
      "aten.roll", "aten.repeat_interleave", "aten.channel_shuffle", "aten.native_channel_shuffle",
      "aten.split_with_sizes_copy", "aten.slice_scatter", "aten.select_scatter",
      "aten.tril", "aten.triu", "aten.reflection_pad2d", "aten.replication_pad2d", "aten.pixel_shuffle",
      "aten.nonzero", "aten.masked_select", "aten.tril_indices", "aten.triu_indices", "aten.as_strided_scatter",
      "aten.copy", "aten.pixel_unshuffle", "aten.rot90", "aten._unsafe_index",
      "aten.im2col", "aten.col2im", "aten._unsafe_masked_index", "aten.block_diag", "aten.diag_embed",
      "aten.diagonal_scatter", "aten.masked_scatter", "aten.index_fill", "aten.put", "aten.lu_unpack",
      "aten._chunk_cat", "aten.nonzero_static", "aten.max_unpool2d", "aten.max_unpool3d", "aten.reflection_pad1d",
      "aten.reflection_pad3d", "aten.replication_pad1d", "aten.replication_pad3d", "aten.affine_grid_generator",
      "aten._to_cpu", "aten._stack", "aten._nested_tensor_from_tensor_list", "aten._nested_from_padded",
      "aten.to_padded_tensor", "aten._jagged_to_padded_dense_forward", "aten._padded_dense_to_jagged_forward",
      "aten._pack_padded_sequence", "aten._foreach_clone", "aten._lazy_clone", "aten.to_mkldnn",
      "aten._cudnn_rnn_flatten_weight", "aten._mkldnn_reshape", "aten._mkldnn_transpose",
      "aten.mkldnn_reorder_conv2d_weight", "aten.mkldnn_reorder_conv3d_weight", "aten._convert_weight_to_int4pack",
      "aten._convert_weight_to_int4pack_for_cpu", "aten._dyn_quant_pack_4bit_weight", "aten.dequantize", "aten.complex",
      "aten.int_repr", "aten._pin_memory", kind="copy")  # fmt: skip
def move(op: Op) -> Work:
    """Each input read once, each output written once."""
    return op.moving()


COPIES_OF_VIEWS = ("alias as_strided detach diagonal expand lift_fresh narrow permute select slice split squeeze t "
                   "transpose unbind unfold unsqueeze values indices view view_as_complex view_as_real _conj "
                   "_neg_view _reshape_alias _reshape").split()  # fmt: skip


@rule(*(f"aten.{view}_copy" for view in COPIES_OF_VIEWS if view != "as_strided"), kind="copy")
def copy_of_view(op: Op) -> Work:
    """A view written out: reads what it writes."""
    written = sum(t.n_bytes for t in op.written)
    return Work(0, written, written)


@rule("aten.slice_backward", "aten.select_backward", "aten.diagonal_backward", "aten.unfold_backward",
      "aten.as_strided_copy", kind="copy")  # fmt: skip
def place(op: Op) -> Work:
    """Zeros of the input's size with the gradient put in its place."""
    return op.moving()


@rule("aten.copy_", kind="copy")
def copy_(op: Op) -> Work:
    """Reads the source, writes the target."""
    return op.moving(skip=("self",))


@rule("aten.zeros", "aten.ones", "aten.full", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.new_zeros",
      "aten.new_ones", "aten.new_full", "aten.scalar_tensor", "aten.arange", "aten.linspace", "aten.eye",
      "aten.rand", "aten.randn", "aten.randint", "aten.rand_like", "aten.randn_like", "aten.randint_like",
      "aten.randperm", "aten.normal", "aten.bernoulli", "aten.multinomial", "aten.logspace", "aten.range", "aten.fill",
      "aten.zero", "aten.poisson", "aten.binomial", "aten._standard_gamma", "aten._sample_dirichlet",
      "aten.normal_functional", "aten.hann_window", "aten.hamming_window", "aten.blackman_window",
      "aten.bartlett_window", "aten.kaiser_window", "aten.fft_fftfreq", "aten.fft_rfftfreq",
      "aten._new_zeros_with_same_feature_meta", "aten._cudnn_init_dropout_state", kind="copy")  # fmt: skip
def fill(op: Op) -> Work:
    """Writes its output; a tensor given for its shape is not read."""
    return Work(0, 0, sum(t.n_bytes for t in op.written))


@rule("aten.zero_", "aten.fill_", "aten.normal_", "aten.uniform_", "aten.random_", "aten.bernoulli_",
      "aten.exponential_", "aten.log_normal_", "aten.cauchy_", "aten.geometric_", kind="copy")  # fmt: skip
def fill_(op: Op) -> Work:
    """Writes in place without reading."""
    return op.moving(skip=("self",))
