"""The parts of which the body of `moevlm::PagedAttention` is put together, in ONNX text, one for each choice.

A part that a node may do without is a pair: what takes its place, and itself.
"""

# Where each token stands: its sequence (as many as end before it), its position there, its page, its row in the page.
PLACES = """
    start = Cast <to = 7> (query_start)
    context = Cast <to = 7> (context_len)
    pages = Cast <to = 7> (page_table)
    tokens_1 = Shape <start = 0, end = 1> (q)
    tokens = Squeeze (tokens_1)
    token = Range (zero, tokens, one)
    ends = Slice (start, one_1, far_1)
    token_column = Unsqueeze (token, one_1)
    ended = GreaterOrEqual (token_column, ends)
    ended_i = Cast <to = 7> (ended)
    sequence = ReduceSum <keepdims = 0> (ended_i, one_1)
    first_token = Gather (start, sequence)
    kept_tokens = Gather (context, sequence)
    place = Sub (token, first_token)
    position = Add (place, kept_tokens)
    page_size_1 = Shape <start = 2, end = 3> (key_cache)
    ordinal = Div (position, page_size_1)
    row = Mod (position, page_size_1)
    sequence_2d = Unsqueeze (sequence, one_1)
    ordinal_2d = Unsqueeze (ordinal, one_1)
    in_table = Concat <axis = 1> (sequence_2d, ordinal_2d)
    page = GatherND (pages, in_table)
    kv_head = Range (zero, kv_heads, one)
    slot_shape = Concat <axis = 0> (tokens_1, kv_heads_1, one_1)
    page_3d = Unsqueeze (page, last_two)
    row_3d = Unsqueeze (row, last_two)
    head_column = Unsqueeze (kv_head, one_1)
    slot_page = Expand (page_3d, slot_shape)
    slot_head = Expand (head_column, slot_shape)
    slot_row = Expand (row_3d, slot_shape)
    slot = Concat <axis = 2> (slot_page, slot_head, slot_row)
"""
TABLES = """
    cos_3d = Unsqueeze (cos, one_1)
    sin_3d = Unsqueeze (sin, one_1)
"""
# x [T, heads, D]: the dimensions from rotary_start turn as two halves.
ROTATE = {
    False: "{x}_turned = Identity ({x}_normed)",
    True: """
        {x}_before = Slice ({x}_normed, zero_1, turn_1, minus_one_1)
        {x}_a = Slice ({x}_normed, turn_1, middle_1, minus_one_1)
        {x}_b = Slice ({x}_normed, middle_1, turned_1, minus_one_1)
        {x}_rest = Slice ({x}_normed, turned_1, far_1, minus_one_1)
        {x}_a_cos = Mul ({x}_a, cos_3d)
        {x}_b_sin = Mul ({x}_b, sin_3d)
        {x}_b_cos = Mul ({x}_b, cos_3d)
        {x}_a_sin = Mul ({x}_a, sin_3d)
        {x}_first = Sub ({x}_a_cos, {x}_b_sin)
        {x}_second = Add ({x}_b_cos, {x}_a_sin)
        {x}_turned = Concat <axis = 2> ({x}_before, {x}_first, {x}_second, {x}_rest)""",
}
NORM = {
    False: "{x}_normed = Identity ({x}_heads)",
    True: "{x}_normed = RMSNormalization <axis = -1, epsilon = {epsilon}> ({x}_heads, {x}_norm)",
}
SCALE = {
    False: """
        key_dim_1 = Shape <start = 2, end = 3> (q_turned)
        key_dim = Cast <to = 1> (key_dim_1)
        root = Sqrt (key_dim)
        q_scaled = Div (q_turned, root)""",
    True: "q_scaled = Mul (q_turned, scale)",
}
VALUES = {
    False: "v_heads = Reshape (v, kv_split)",
    True: "v_heads = Identity (k_heads)",
}
VALUE_NORM = {
    False: "v_normed = Identity (v_heads)",
    True: """
        v_squares = Mul (v_heads, v_heads)
        v_mean = ReduceMean <keepdims = 1> (v_squares, minus_one_1)
        v_more = Add (v_mean, v_epsilon)
        v_root = Sqrt (v_more)
        v_normed = Div (v_heads, v_root)""",
}
WRITE_VALUES = "value_cache_out = ScatterND (value_cache, slot, v_normed)"
READ_VALUES = {
    False: """
        value_pages = Gather (value_cache_out, own_pages)
        value_rows = Transpose <perm = [1, 0, 2, 3]> (value_pages)
        value_shape = Concat <axis = 0> (kv_heads_1, flat_length, value_width_1)
        value_flat = Reshape <allowzero = 1> (value_rows, value_shape)
        values = Slice (value_flat, zero_1, length_1, one_1)""",
    True: "values = Slice (keys, zero_1, value_dim_1, two_1)",
}
SOFTCAP = {
    False: "capped = Identity (scores)",
    True: """
        bent = Div (scores, softcap)
        between = Tanh (bent)
        capped = Mul (between, softcap)""",
}
VISIBLE = {
    False: "visible = LessOrEqual (key_position, query_position)",
    True: """
        own_end = Slice (end, from_1, to_1)
        end_column = Unsqueeze (own_end, one_1)
        causal = LessOrEqual (key_position, query_position)
        before_end = Less (key_position, end_column)
        visible = Or (causal, before_end)""",
}
WINDOW = {
    False: "near = Identity (visible)",
    True: """
        key_end = Add (key_position, window)
        in_window = Greater (key_end, query_position)
        near = And (visible, in_window)""",
}
CHUNK = {
    False: "seen = Identity (near)",
    True: """
        chunk_number = Div (query_position, chunk)
        chunk_start = Mul (chunk_number, chunk)
        in_chunk = GreaterOrEqual (key_position, chunk_start)
        seen = And (near, in_chunk)""",
}
SOFTMAX = {
    False: "weights = Softmax <axis = -1> (masked)",
    True: """
        top_of_keys = ReduceMax <keepdims = 1> (masked, minus_one_1)
        top = Max (top_of_keys, sink)
        below_top = Sub (masked, top)
        powers = Exp (below_top)
        sum_of_keys = ReduceSum <keepdims = 1> (powers, minus_one_1)
        sink_below_top = Sub (sink, top)
        sink_power = Exp (sink_below_top)
        total = Add (sum_of_keys, sink_power)
        weights = Div (powers, total)""",
}
# The sequences one after the other: each reads its own pages, so memory grows with the longest.
LOOP = """
    sequences = Size (context)
    key_width_1 = Shape <start = 3, end = 4> (key_cache)
    none_shape = Concat <axis = 0> (zero_1, kv_heads_1, group_1, value_width_1)
    nothing = ConstantOfShape (none_shape)
    y_heads = Loop <body = one_sequence (int64 n, bool go, float[?, ?, ?, ?] y_in)
        => (bool go_on, float[?, ?, ?, ?] y_more) {{
        go_on = Identity (go)
        n_1 = Unsqueeze (n, zero_1)
        next_1 = Add (n_1, one_1)
        from_1 = Gather (start, n_1)
        to_1 = Gather (start, next_1)
        own_context = Gather (context, n_1)
        own_tokens = Sub (to_1, from_1)
        length_1 = Add (own_context, own_tokens)
        reach = Add (length_1, page_size_1)
        reach_less = Sub (reach, one_1)
        page_count = Div (reach_less, page_size_1)
        own_row = Gather (pages, n)
        own_pages = Slice (own_row, zero_1, page_count)
        flat_length = Mul (page_count, page_size_1)
        key_shape = Concat <axis = 0> (kv_heads_1, flat_length, key_width_1)
        key_pages = Gather (key_cache_out, own_pages)
        key_rows = Transpose <perm = [1, 0, 2, 3]> (key_pages)
        key_flat = Reshape <allowzero = 1> (key_rows, key_shape)
        keys = Slice (key_flat, zero_1, length_1, one_1)
        {read_values}
        own_q = Slice (q_groups, from_1, to_1, zero_1)
        queries = Transpose <perm = [1, 2, 0, 3]> (own_q)
        keys_across = Transpose <perm = [0, 2, 1]> (keys)
        keys_4d = Unsqueeze (keys_across, one_1)
        scores = MatMul (queries, keys_4d)
        {softcap}
        own_position = Slice (position, from_1, to_1)
        query_position = Unsqueeze (own_position, one_1)
        length = Squeeze (length_1)
        key_position = Range (zero, length, one)
        {visible}
        {window}
        {chunk}
        masked = Where (seen, capped, minus_inf)
        {softmax}
        values_4d = Unsqueeze (values, one_1)
        own_y = MatMul (weights, values_4d)
        own_y_rows = Transpose <perm = [2, 0, 1, 3]> (own_y)
        y_more = Concat <axis = 0> (y_in, own_y_rows)
    }}> (sequences, true, nothing)
    y_shape = Concat <axis = 0> (tokens_1, minus_one_1)
    y = Reshape (y_heads, y_shape)
"""
