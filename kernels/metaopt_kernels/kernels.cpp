// Updates of lists of tensors, all operations on a block of elements while it is in the cache.
//
// The interface is C: the library knows neither Python nor torch. A program is a list of instructions in passes. A sum over a
// tensor ends a pass, since what follows from it needs the whole tensor. The arithmetic is that of torch's own kernels,
// operation by operation, so that a run may go on with or without the library. torch's compiler has fused some products
// with sums: `Rounding` says in which way, and who calls finds it out by comparing bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef int64_t i64;
typedef uint64_t u64;
#if defined(_OPENMP)
#define EACH_LANE _Pragma("omp simd")
#elif defined(__clang__)
#define EACH_LANE _Pragma("clang loop vectorize(assume_safety)")
#else
#define EACH_LANE _Pragma("GCC ivdep")
#endif

static const i64 BLOCK = 1024;      // elements of a tensor that go through a program together
static const i64 ALIGNED = 64;      // threads share a tensor at multiples of this
static const i64 SERIAL = 1 << 15;  // fewer elements than this are the work of one thread
static const int REGISTERS = 12, NUMBERS = 64, SUMS = 8, LISTS = 24, LANES = 16;

enum Op { MOVE, ADD, SUB, MUL, DIV, LT, LE, GT, SELECT, SQRT, ABS, NEG, HYPOT, MAX, LERP, ADDCMUL, SQUARES, PRODUCTS, SUM, ADAM, SGD };
// where an operand is: a block of working memory, a block of a tensor, a number of the program, a number of this tensor;
// the last number of the program is the divisor of the gradients, the last one of the tensor its size
enum Place { REGISTER, TENSOR, NUMBER, OF_TENSOR };
// how a product and a sum round: twice, or once with the first product of the two fused, or with the last
enum Rounding { TWICE, FIRST, LAST };

extern "C" {
struct Instruction { int32_t op, to, a, b, c; };
static const int KIND = 20, INDEX = (1 << KIND) - 1;

struct Job {
  const Instruction* code;
  const int32_t* ends;  // of each pass: where the part for elements ends, and the part for numbers of the tensor
  i64 passes, tensors, lists, kept, threads;
  const u64* address;   // by list, by tensor
  const i64* size;      // of each tensor
  const double* number;
  const u64* count;     // of each tensor: its count of updates, which the base raises; null without a base
  const double* base;   // the base's settings
  const float* divisor; // of the gradients; null: 1
  i64 vector, rounding, rest_rounding, lerp_rounding, product_rounding, quads;
};
}

template <class T> static inline T once(T a, T b, T c);
template <> inline float once(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <> inline double once(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <int R, class T> static inline T fused(T a, T b, T c) { return R == TWICE ? a * b + c : once(a, b, c); }
template <int R, class T> static inline T both(T a, T b, T c, T d) {
  return R == TWICE ? a * b + c * d : R == FIRST ? once(a, b, c * d) : once(c, d, a * b);
}

// ---- torch's optimizers

template <class T> struct Base {
  T rate, decay, l2, first, second, second_rest, root, eps, step, momentum, rest, sign, divisor;
  bool divides, nesterov;
};

template <class T> static Base<T> adam_settings(const Job& j, float count) {
  const double lr = j.base[0], beta1 = j.base[1], beta2 = j.base[2], wd = j.base[4];
  const bool decoupled = j.base[6] != 0;
  Base<T> s{};
  s.sign = T(j.base[5] != 0 ? -1 : 1), s.decay = T(decoupled && wd != 0 ? 1 - lr * wd : 1), s.l2 = T(decoupled ? 0 : wd);
  s.first = T(1 - beta1), s.second = T(beta2), s.second_rest = T(1 - beta2), s.eps = T(j.base[3]);
  s.root = T(std::sqrt(1 - std::pow(beta2, (double)count))), s.step = T(lr / (1 - std::pow(beta1, (double)count)));
  return s;
}

template <class T> static Base<T> sgd_settings(const Job& j) {
  Base<T> s{};
  s.rate = T(-j.base[0]), s.momentum = T(j.base[1]), s.rest = T(1 - j.base[2]), s.nesterov = j.base[3] != 0, s.l2 = T(j.base[4]);
  s.sign = T(j.base[5] != 0 ? -1 : 1);
  return s;
}

template <int R, bool NEAR, bool DIVIDES, class T>
static void adam(T* to, const T* p, const T* g, T* m, T* v, const Base<T>& s, i64 n) {
  const T far = s.first - T(1), decay = s.decay, first = s.first, second = s.second, second_rest = s.second_rest, root = s.root,
          eps = s.eps, step = s.step, sign = s.sign, divisor = s.divisor, l2 = s.l2;
#define ADAM_LOOP(GRADIENT)                                                   \
  EACH_LANE for (i64 i = 0; i < n; i++) {                                     \
    const T raw = (DIVIDES ? g[i] / divisor : g[i]) * sign, x = GRADIENT, d = x - m[i]; \
    const T mean = NEAR ? fused<R>(first, d, m[i]) : fused<R>(far, d, x);     \
    const T square = both<R>(v[i], second, second_rest * x, x);               \
    m[i] = mean, v[i] = square;                                               \
    to[i] = p[i] * decay - (step * mean) / (std::sqrt(square) / root + eps);  \
  }
  if (l2 != 0) { ADAM_LOOP(fused<R>(p[i], l2, raw)) } else { ADAM_LOOP(raw) }
}

template <int R, class T> static void adam(T* to, const T* p, const T* g, T* m, T* v, const Base<T>& s, i64 n) {
  const bool near = std::abs(s.first) < T(0.5);
  if (s.divides) near ? adam<R, true, true>(to, p, g, m, v, s, n) : adam<R, false, true>(to, p, g, m, v, s, n);
  else near ? adam<R, true, false>(to, p, g, m, v, s, n) : adam<R, false, false>(to, p, g, m, v, s, n);
}

template <int R, class T> static void sgd(T* to, const T* p, const T* g, T* b, const Base<T>& s, i64 n) {
  const T rate = s.rate, l2 = s.l2, momentum = s.momentum, rest = s.rest, sign = s.sign, divisor = s.divides ? s.divisor : T(1);
#define SGD_LOOP(STEP)                                      \
  EACH_LANE for (i64 i = 0; i < n; i++) {                   \
    const T raw = g[i] / divisor * sign, x = l2 != 0 ? fused<R>(p[i], l2, raw) : raw; \
    to[i] = fused<R>(STEP, rate, p[i]);                     \
  }
  if (momentum == 0) { SGD_LOOP(x) }
  else if (s.nesterov) { SGD_LOOP(fused<R>(b[i] = both<R>(b[i], momentum, rest, x), momentum, x)) }
  else { SGD_LOOP(b[i] = both<R>(b[i], momentum, rest, x)) }
}

template <class F> static void by_fusion(i64 rounding, F f) {
  if (rounding == TWICE) f(std::integral_constant<int, TWICE>());
  else f(std::integral_constant<int, LAST>());
}

template <class F> static void by_rounding(i64 rounding, F f) {
  if (rounding == TWICE) f(std::integral_constant<int, TWICE>());
  else if (rounding == FIRST) f(std::integral_constant<int, FIRST>());
  else f(std::integral_constant<int, LAST>());
}

// ---- single operations; an operand is a list, or one number for all elements

template <class T> struct Operand { T* at; bool is_list; };

template <class T, class F> static void each(T* d, Operand<T> a, Operand<T> b, i64 n, F f) {
  if (a.is_list && b.is_list) { EACH_LANE for (i64 i = 0; i < n; i++) d[i] = f(a.at[i], b.at[i]); }
  else if (a.is_list) { const T y = *b.at; EACH_LANE for (i64 i = 0; i < n; i++) d[i] = f(a.at[i], y); }
  else if (b.is_list) { const T x = *a.at; EACH_LANE for (i64 i = 0; i < n; i++) d[i] = f(x, b.at[i]); }
  else { const T z = f(*a.at, *b.at); for (i64 i = 0; i < n; i++) d[i] = z; }
}

template <class T, class F> static void each(T* d, Operand<T> a, Operand<T> b, Operand<T> c, i64 n, F f) {
  if (a.is_list && b.is_list && c.is_list) { EACH_LANE for (i64 i = 0; i < n; i++) d[i] = f(a.at[i], b.at[i], c.at[i]); }
  else if (a.is_list && b.is_list) { const T z = *c.at; EACH_LANE for (i64 i = 0; i < n; i++) d[i] = f(a.at[i], b.at[i], z); }
  else if (a.is_list && c.is_list) { const T y = *b.at; EACH_LANE for (i64 i = 0; i < n; i++) d[i] = f(a.at[i], y, c.at[i]); }
  else if (a.is_list) { const T y = *b.at, z = *c.at; EACH_LANE for (i64 i = 0; i < n; i++) d[i] = f(a.at[i], y, z); }
  else { const T x = *a.at; for (i64 i = 0; i < n; i++) d[i] = f(x, b.at[b.is_list ? i : 0], c.at[c.is_list ? i : 0]); }
}

// ---- sums in torch's order: by the lanes of a vector, these from first to last, then the rest of the tensor

template <class T> struct Lanes { T lane[LANES]; };

template <int W, class T> static void add_squares(T* lane, const T* x, i64 n) {
  T sum[W];
  std::memcpy(sum, lane, sizeof sum);
  for (i64 i = 0; i + W <= n; i += W) { EACH_LANE for (int k = 0; k < W; k++) sum[k] += x[i + k] * x[i + k]; }
  std::memcpy(lane, sum, sizeof sum);
}

template <class T> static void add_squares(Lanes<T>& s, i64 width, const T* x, i64 n) {
  if (width == 4) add_squares<4>(s.lane, x, n);
  else if (width == 8) add_squares<8>(s.lane, x, n);
  else add_squares<16>(s.lane, x, n);
}

template <class T> static T total(const Lanes<T>& s, i64 width, const T* rest, i64 n, i64 quads) {
  T sum = s.lane[0];
  for (i64 k = 1; k < width; k++) sum += s.lane[k];
  const i64 twice = quads ? n / 4 * 4 : n;
  for (i64 i = 0; i < twice; i++) sum += rest[i] * rest[i];
  for (i64 i = twice; i < n; i++) sum = once(rest[i], rest[i], sum);
  return sum;
}

// several rows side by side: one sum alone would wait for itself at every addition
template <int W, int ROWS, class T> static void norms_of_rows(const T* const* x, i64 n, T* out, i64 quads) {
  T sum[ROWS][W] = {};
  const i64 whole = n / W * W;
  for (i64 i = 0; i < whole; i += W)
    for (int r = 0; r < ROWS; r++) { EACH_LANE for (int k = 0; k < W; k++) sum[r][k] += x[r][i + k] * x[r][i + k]; }
  for (int r = 0; r < ROWS; r++) {
    Lanes<T> s;
    std::memcpy(s.lane, sum[r], sizeof sum[r]);
    out[r] = std::sqrt(total<T>(s, W, x[r] + whole, n - whole, quads));
  }
}

// ---- a program

template <class T> struct Worker {
  const Job& j;
  alignas(64) T registers[REGISTERS][BLOCK];
  T numbers[NUMBERS], of_tensor[NUMBERS];
  Lanes<T> lanes[SUMS];
  double sums[SUMS];
  std::vector<std::vector<T>> kept;  // what one pass leaves for the next one, of one tensor
  const i64 width;

  Worker(const Job& job, i64 longest) : j(job), kept(job.kept, std::vector<T>(job.kept ? longest : 0)), width(job.vector / sizeof(T)) {
    for (int i = 0; i < NUMBERS; i++) numbers[i] = T(j.number[i]), of_tensor[i] = 0;
    numbers[NUMBERS - 1] = j.divisor ? T(*j.divisor) : T(1);
  }

  // take a part of one tensor through one pass; `from` is a multiple of ALIGNED
  void elements(const Instruction* begin, const Instruction* end, i64 tensor, i64 from, i64 to, const Base<T>& base) {
    const i64 size = j.size[tensor];
    for (i64 at = from; at < to; at += BLOCK) {
      const i64 n = std::min(BLOCK, to - at), rest = at + n == size ? size % width : 0;
      auto place = [&](int32_t o) -> Operand<T> {
        const int kind = o >> KIND, index = o & INDEX;
        if (kind == REGISTER) return {registers[index], true};
        if (kind == NUMBER) return {numbers + index, false};
        if (kind == OF_TENSOR) return {of_tensor + index, false};
        return {(index < j.lists ? (T*)j.address[index * j.tensors + tensor] : kept[index - j.lists].data()) + at, true};
      };
      for (const Instruction* q = begin; q < end; q++) {
        if (q->op == SQUARES) add_squares(*q, place(q->a).at, n - rest, rest, at + n == size);
        else if (q->op == PRODUCTS || q->op == SUM) add(*q, place(q->a).at, q->op == SUM ? nullptr : place(q->b).at, n, at + n == size);
        else if (q->op == ADAM || q->op == SGD) {
          T *d = place(q->to).at, *p = place(q->a).at, *g = place(q->b).at;
          T *m = q->c ? place(q->c).at : nullptr, *v = q->op == ADAM ? place(q->c + 1).at : nullptr;
          step(j.rounding, d, p, g, m, v, base, n - rest);
          if (rest) { const i64 k = n - rest; step(j.rest_rounding, d + k, p + k, g + k, m ? m + k : m, v ? v + k : v, base, rest); }
        } else single(*q, place(q->to).at, place(q->a), place(q->b), place(q->c), n);
      }
    }
  }

  // work out what follows from the sums over one tensor
  void of_sums(const Instruction* begin, const Instruction* end) {
    auto place = [&](int32_t o) -> Operand<T> { return {((o >> KIND) == NUMBER ? numbers : of_tensor) + (o & INDEX), false}; };
    for (const Instruction* q = begin; q < end; q++) single(*q, place(q->to).at, place(q->a), place(q->b), place(q->c), 1);
  }

  void step(i64 rounding, T* d, const T* p, const T* g, T* m, T* v, const Base<T>& base, i64 n) {
    by_rounding(rounding, [&](auto r) { v ? adam<decltype(r)::value>(d, p, g, m, v, base, n) : sgd<decltype(r)::value>(d, p, g, m, base, n); });
  }

  void add_squares(const Instruction& q, const T* x, i64 n, i64 rest, bool is_last) {
    Lanes<T>& s = lanes[q.c & INDEX];
    ::add_squares(s, width, x, n);
    if (is_last) { of_tensor[q.to & INDEX] = total(s, width, x + n, rest, j.quads); s = {}; }
  }

  void add(const Instruction& q, const T* a, const T* b, i64 n, bool is_last) {
    double& sum = sums[q.c & INDEX];
    T part[LANES] = {};
    i64 i = 0;
    if (b) for (; i + LANES <= n; i += LANES) { EACH_LANE for (int k = 0; k < LANES; k++) part[k] += a[i + k] * b[i + k]; }
    else for (; i + LANES <= n; i += LANES) { EACH_LANE for (int k = 0; k < LANES; k++) part[k] += a[i + k]; }
    for (int k = 0; k < LANES; k++) sum += part[k];
    for (; i < n; i++) sum += b ? a[i] * b[i] : a[i];
    if (is_last) { of_tensor[q.to & INDEX] = T(sum); sum = 0; }
  }

  void single(const Instruction& q, T* d, Operand<T> a, Operand<T> b, Operand<T> c, i64 n) {
    switch (q.op) {
      case MOVE: each(d, a, a, n, [](T x, T) { return x; }); break;
      case ADD: each(d, a, b, n, [](T x, T y) { return x + y; }); break;
      case SUB: each(d, a, b, n, [](T x, T y) { return x - y; }); break;
      case MUL: each(d, a, b, n, [](T x, T y) { return x * y; }); break;
      case DIV: each(d, a, b, n, [](T x, T y) { return x / y; }); break;
      case LT: each(d, a, b, n, [](T x, T y) { return x < y ? T(1) : T(0); }); break;
      case LE: each(d, a, b, n, [](T x, T y) { return x <= y ? T(1) : T(0); }); break;
      case GT: each(d, a, b, n, [](T x, T y) { return x > y ? T(1) : T(0); }); break;
      case MAX: each(d, a, b, n, [](T x, T y) { return x > y || x != x ? x : y; }); break;
      case SELECT: each(d, a, b, c, n, [](T x, T y, T z) { return x != T(0) ? y : z; }); break;
      case SQRT: each(d, a, a, n, [](T x, T) { return std::sqrt(x); }); break;
      case ABS: each(d, a, a, n, [](T x, T) { return std::abs(x); }); break;
      case NEG: each(d, a, a, n, [](T x, T) { return -x; }); break;
      case HYPOT: each(d, a, b, n, [](T x, T y) { return std::hypot(x, y); }); break;
      case ADDCMUL:
        by_fusion(j.product_rounding, [&](auto r) { each(d, a, b, c, n, [](T x, T y, T z) { return fused<decltype(r)::value>(y, z, x); }); });
        break;
      case LERP:
        by_fusion(j.lerp_rounding, [&](auto r) {
          if (std::abs(*c.at) < T(0.5)) each(d, a, b, c, n, [](T x, T y, T w) { return fused<decltype(r)::value>(w, y - x, x); });
          else each(d, a, b, c, n, [](T x, T y, T w) { return fused<decltype(r)::value>(w - T(1), y - x, y); });
        });
        break;
    }
  }
};

template <class T> static void run(const Job& j) {
  i64 elements = 0, longest = 0;
  for (i64 t = 0; t < j.tensors; t++) elements += j.size[t], longest = std::max(longest, j.size[t]);
  std::vector<float> counts(j.count ? j.tensors : 0);
  for (size_t t = 0; t < counts.size(); t++) counts[t] = *(float*)j.count[t] += 1;
  const i64 threads = elements < SERIAL ? 1 : j.threads;
  auto work = [&](i64 me, i64 of) {
    std::vector<Worker<T>> room;  // on the heap: too large for the stack of a thread
    room.reserve(1);
    room.emplace_back(j, longest);
    Worker<T>& worker = room[0];
    std::memset(worker.lanes, 0, sizeof worker.lanes), std::memset(worker.sums, 0, sizeof worker.sums);
    Base<T> base = sgd_settings<T>(j);
    float count = -1;
    auto whole = [&](i64 t, i64 from, i64 to) {
      if (j.count && counts[t] != count) base = adam_settings<T>(j, count = counts[t]);
      if ((base.divides = j.divisor != nullptr)) base.divisor = T(*j.divisor);
      worker.of_tensor[NUMBERS - 1] = T(j.size[t]);
      const Instruction* code = j.code;
      for (i64 pass = 0; pass < j.passes; pass++) {
        worker.elements(code, j.code + j.ends[2 * pass], t, from, to, base);
        worker.of_sums(j.code + j.ends[2 * pass], code = j.code + j.ends[2 * pass + 1]);
      }
    };
    // a tensor with sums is the work of one thread, or the sums would depend on the number of threads
    const bool splits = j.passes == 1 && j.ends[0] == j.ends[1];
    const i64 low = elements * me / of, high = elements * (me + 1) / of;
    i64 at = 0;
    for (i64 t = 0; t < j.tensors; at += j.size[t++]) {
      const i64 size = j.size[t];
      auto cut = [&](i64 x) { return x <= 0 ? 0 : x >= size ? size : x & ~(ALIGNED - 1); };
      const i64 from = splits ? cut(low - at) : 0, to = splits ? cut(high - at) : at >= low && at < high ? size : 0;
      if (from < to) whole(t, from, to);
    }
  };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(0, 1);
}

// the norms of rows of equal length each: `rows[i]` rows of `size[i]` elements from `address[i]` on
template <int W, class T> static void norms(i64 tensors, const u64* address, const i64* rows, const i64* size, T* out, i64 threads, i64 quads) {
  static const int TOGETHER = 4;
  struct Piece { const T* x[TOGETHER]; i64 n, count; T* out; };
  std::vector<Piece> pieces;
  i64 elements = 0;
  for (i64 i = 0; i < tensors; i++) {
    elements += rows[i] * size[i];
    for (i64 r = 0; r < rows[i];) {
      Piece piece{{}, size[i], std::min<i64>(TOGETHER, rows[i] - r), out};
      for (i64 k = 0; k < piece.count; k++) piece.x[k] = (const T*)address[i] + (r + k) * size[i];
      pieces.push_back(piece);
      r += piece.count, out += piece.count;
    }
  }
  const i64 number = pieces.size();
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && elements >= SERIAL)
#endif
  for (i64 i = 0; i < number; i++) {
    const Piece& q = pieces[i];
    if (q.count == TOGETHER) norms_of_rows<W, TOGETHER>(q.x, q.n, q.out, quads);
    else for (i64 k = 0; k < q.count; k++) norms_of_rows<W, 1>(q.x + k, q.n, q.out + k, quads);
  }
}

extern "C" {
int32_t metaopt_version() { return 1; }
void metaopt_run_float(const Job* j) { run<float>(*j); }
void metaopt_run_double(const Job* j) { run<double>(*j); }

// the norm over all rows, of their norms
float metaopt_norm_float(i64 tensors, const u64* address, const i64* rows, const i64* size, i64 vector, i64 quads, i64 threads) {
  i64 number = 0;
  for (i64 i = 0; i < tensors; i++) number += rows[i];
  std::vector<float> out(number);
  const u64 at = (u64)out.data();
  const i64 one = 1;
  float norm = 0;
#define NORMS(W) norms<W>(tensors, address, rows, size, out.data(), threads, quads), norms<W>(1, &at, &one, &number, &norm, 1, quads)
  if (vector == 16) NORMS(4); else if (vector == 32) NORMS(8); else NORMS(16);
#undef NORMS
  return norm;
}
}
