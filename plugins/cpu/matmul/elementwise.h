// Everything but the products, written once over a vector type V. Each instruction set's file includes it inside its
// own target region, with a V of its own. V::lanes divides 16.

template <class V>
struct Elementwise {
  static constexpr int lanes = V::lanes;

  // numpy's float32 exp (rational approximation over Cody-Waite reduction), operation by operation, so that router
  // scores have the bits that the spec's have wherever numpy has its vector loops.
  static inline V exp(V x) {
    const V inside = V::max(V::min(x, V::set(88.72283935546875f)), V::set(-103.97208404541015625f));
    const V n = V::round(V::mul(inside, V::set(1.442695040888963407359924681001892137f)));
    V r = V::fma(n, V::set(-6.93145752e-1f), inside);
    r = V::fma(n, V::set(-1.42860677e-6f), r);
    V p = V::fma(V::set(5.082762527590693718096e-04f), r, V::set(6.757896990527504603057e-03f));
    p = V::fma(p, r, V::set(5.114512081637298353406e-02f));
    p = V::fma(p, r, V::set(2.473615434895520810817e-01f));
    p = V::fma(p, r, V::set(7.257664613233124478488e-01f));
    p = V::fma(p, r, V::set(9.999999999980870924916e-01f));
    V q = V::fma(V::set(2.159509375685829852307e-02f), r, V::set(-2.742335390411667452936e-01f));
    q = V::fma(q, r, V::set(1.0f));
    return V::scale(V::div(p, q), n);
  }

  static inline V logistic(V x) {
    const V one = V::set(1.0f);
    return V::div(one, V::add(one, exp(V::sub(V::set(0.0f), x))));
  }

  static void quantize_block(const float* x, Packing packing, uint8_t* row) {
    V most = V::set(0.0f);
    for (int i = 0; i < packing.block; i += lanes) most = V::max_magnitude(most, V::load(x + i));
    const float absmax = most.largest_magnitude();  // NaN if there is one, which the scale carries to the result
    const float scale = absmax / 127.0f;
    const V inverse = V::set(absmax < 1e-35f ? 0.0f : 127.0f / absmax);
    V sum = V::set(0.0f);
    for (int i = 0; i < packing.block; i += lanes) {
      const V q = V::round(V::mul(V::load(x + i), inverse));
      sum = V::add(sum, q);
      q.store_int8(reinterpret_cast<int8_t*>(row + kActivationHeader + i));
    }
    const float total = sum.sum();
    const int32_t start = total == total ? -packing.zero_point() * static_cast<int32_t>(total) : 0;
    std::memcpy(row, &scale, 4);
    std::memcpy(row + 4, &start, 4);
  }

  static void quantize(const float* x, size_t k, Packing packing, uint8_t* row) {
    const size_t block = packing.block;
    size_t done = 0;
    for (; done + block <= k; done += block, row += block + kActivationHeader) quantize_block(x + done, packing, row);
    if (done < k) {
      alignas(64) float rest[kMaxBlock] = {};
      std::memcpy(rest, x + done, (k - done) * sizeof(float));
      quantize_block(rest, packing, row);
    }
  }

  static inline V activate(V gate, const ActivationSpec& spec) {
    if (spec.kind == Activation::silu) return V::mul(gate, logistic(gate));
    // 0.5 (1 + tanh(z)) = logistic(2 z)
    const V cube = V::mul(V::mul(gate, gate), gate);
    const V z = V::fma(V::set(0.044715f), cube, gate);
    return V::mul(gate, logistic(V::mul(V::set(1.5957691216057308f), z)));
  }

  static void activate(const float* out, const float* bias, float factor, const ActivationSpec& spec, float* channels) {
    const V f = V::set(factor);
    auto value = [&](int i) { return V::fma(f, V::load(out + i), V::load(bias + i)); };
    if (!spec.gated) {
      for (int i = 0; i < 32; i += lanes) activate(value(i), spec).store(channels + i);
    } else if (spec.kind != Activation::swiglu_clamped) {
      for (int i = 0; i < 16; i += lanes) V::mul(activate(value(i), spec), value(16 + i)).store(channels + i);
    } else {
      const V limit = V::set(spec.limit), low = V::set(-spec.limit), one = V::set(1.0f), alpha = V::set(spec.alpha);
      for (int i = 0; i < 16; i += lanes) {
        const V gate = V::min(value(i), limit);
        const V up = V::max(V::min(value(16 + i), limit), low);
        V::mul(V::mul(gate, logistic(V::mul(alpha, gate))), V::add(up, one)).store(channels + i);
      }
    }
  }

  static void store(const float* out, const float* bias, int count, float* y) {
    int i = 0;
    for (; i + lanes <= count; i += lanes) V::add(V::load(out + i), V::load(bias + i)).store(y + i);
    for (; i < count; ++i) y[i] = out[i] + bias[i];
  }

  static void accumulate(const float* out, const float* bias, float weight, int count, float* y) {
    const V w = V::set(weight);
    int i = 0;
    for (; i + lanes <= count; i += lanes)
      V::fma(w, V::add(V::load(out + i), V::load(bias + i)), V::load(y + i)).store(y + i);
    for (; i < count; ++i) y[i] = std::fma(weight, out[i] + bias[i], y[i]);
  }

  // f over x in place; a rest shorter than a vector goes through a padded copy.
  template <class F>
  static inline void map(float* x, size_t n, F f) {
    size_t i = 0;
    for (; i + lanes <= n; i += lanes) f(V::load(x + i)).store(x + i);
    if (i < n) {
      alignas(64) float rest[16] = {};
      std::memcpy(rest, x + i, (n - i) * sizeof(float));
      f(V::load(rest)).store(rest);
      std::memcpy(x + i, rest, (n - i) * sizeof(float));
    }
  }

  // numpy's pairwise summation: eight running sums up to 128 values, halves above.
  static float pairwise_sum(const float* x, size_t n) {
    if (n < 8) {
      float sum = 0.0f;
      for (size_t i = 0; i < n; ++i) sum += x[i];
      return sum;
    }
    if (n > 128) {
      const size_t half = n / 2 - n / 2 % 8;
      return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
    }
    float s[8];
    std::memcpy(s, x, sizeof(s));
    size_t i = 8;
    for (; i + 8 <= n; i += 8)
      for (int j = 0; j < 8; ++j) s[j] += x[i + j];
    float sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    for (; i < n; ++i) sum += x[i];
    return sum;
  }

  static void softmax(float* x, size_t n) {
    float most = x[0];
    for (size_t i = 1; i < n; ++i) most = most < x[i] ? x[i] : most;
    map(x, n, [most](V v) { return exp(V::sub(v, V::set(most))); });
    const V sum = V::set(pairwise_sum(x, n));
    map(x, n, [sum](V v) { return V::div(v, sum); });
  }

  static void sigmoid(float* x, size_t n) {
    map(x, n, [](V v) {
      const V one = V::set(1.0f);
      const V small = exp(V::negative_magnitude(v));
      return V::div(V::select_nonnegative(v, one, small), V::add(one, small));
    });
  }
};
