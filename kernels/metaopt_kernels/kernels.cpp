// Updates of lists of tensors, all operations on a block of elements while it is in the cache.
//
// The interface is C: the library knows neither Python nor torch. A program is a list of instructions on elements. The
// arithmetic is that of torch's own kernels, operation by operation, so that a run may go on with or without the library.
// torch's compiler has fused some products with sums: `Rounding` says in which way, and who calls finds it out by
// comparing bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
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
static const int REGISTERS = 12, NUMBERS = 64;

enum Op { MOVE, ADD, SUB, MUL, DIV, LT, LE, GT, SELECT, SQRT, ABS, NEG, HYPOT, MAX, LERP, ADDCMUL, ADAM, SGD };
// where an operand is: a block of working memory, a block of a tensor, a number of the program; the last number of the
// program is the divisor of the gradients
enum Place { REGISTER, TENSOR, NUMBER };
// how a product and a sum round: twice, or once with the first product of the two fused, or with the last
enum Rounding { TWICE, FIRST, LAST };

extern "C" {
struct Instruction { int32_t op, to, a, b, c; };
static const int KIND = 20, INDEX = (1 << KIND) - 1;

struct Job {
  const Instruction* code;
  i64 length, tensors, threads;
  const u64* address;   // by list, by tensor
  const i64* size;      // of each tensor
  const double* number;
  const u64* count;     // of each tensor: its count of updates, which the base raises; null without a base
  const double* base;   // the base's settings
  const float* divisor; // of the gradients; null: 1
  i64 vector, rounding, rest_rounding, lerp_rounding, product_rounding;
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

// ---- a program

template <class T> struct Worker {
  const Job& j;
  alignas(64) T registers[REGISTERS][BLOCK];
  T numbers[NUMBERS];
  const i64 width;

  explicit Worker(const Job& job) : j(job), width(job.vector / sizeof(T)) {
    for (int i = 0; i < NUMBERS; i++) numbers[i] = T(j.number[i]);
    numbers[NUMBERS - 1] = j.divisor ? T(*j.divisor) : T(1);
  }

  // take a part of one tensor through the program; `from` is a multiple of ALIGNED
  void elements(i64 tensor, i64 from, i64 to, const Base<T>& base) {
    const i64 size = j.size[tensor];
    for (i64 at = from; at < to; at += BLOCK) {
      const i64 n = std::min(BLOCK, to - at), rest = at + n == size ? size % width : 0;
      auto place = [&](int32_t o) -> Operand<T> {
        const int kind = o >> KIND, index = o & INDEX;
        if (kind == REGISTER) return {registers[index], true};
        if (kind == NUMBER) return {numbers + index, false};
        return {(T*)j.address[index * j.tensors + tensor] + at, true};
      };
      for (const Instruction* q = j.code; q < j.code + j.length; q++) {
        if (q->op == ADAM || q->op == SGD) {
          T *d = place(q->to).at, *p = place(q->a).at, *g = place(q->b).at;
          T *m = q->c ? place(q->c).at : nullptr, *v = q->op == ADAM ? place(q->c + 1).at : nullptr;
          step(j.rounding, d, p, g, m, v, base, n - rest);
          if (rest) { const i64 k = n - rest; step(j.rest_rounding, d + k, p + k, g + k, m ? m + k : m, v ? v + k : v, base, rest); }
        } else single(*q, place(q->to).at, place(q->a), place(q->b), place(q->c), n);
      }
    }
  }

  void step(i64 rounding, T* d, const T* p, const T* g, T* m, T* v, const Base<T>& base, i64 n) {
    by_rounding(rounding, [&](auto r) { v ? adam<decltype(r)::value>(d, p, g, m, v, base, n) : sgd<decltype(r)::value>(d, p, g, m, base, n); });
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
  i64 elements = 0;
  for (i64 t = 0; t < j.tensors; t++) elements += j.size[t];
  std::vector<float> counts(j.count ? j.tensors : 0);
  for (size_t t = 0; t < counts.size(); t++) counts[t] = *(float*)j.count[t] += 1;
  const i64 threads = elements < SERIAL ? 1 : j.threads;
  auto work = [&](i64 me, i64 of) {
    std::vector<Worker<T>> room;  // on the heap: too large for the stack of a thread
    room.reserve(1);
    room.emplace_back(j);
    Base<T> base = sgd_settings<T>(j);
    float count = -1;
    const i64 low = elements * me / of, high = elements * (me + 1) / of;
    i64 at = 0;
    for (i64 t = 0; t < j.tensors; at += j.size[t++]) {
      const i64 size = j.size[t];
      auto cut = [&](i64 x) { return x <= 0 ? 0 : x >= size ? size : x & ~(ALIGNED - 1); };
      const i64 from = cut(low - at), to = cut(high - at);
      if (from >= to) continue;
      if (j.count && counts[t] != count) base = adam_settings<T>(j, count = counts[t]);
      if ((base.divides = j.divisor != nullptr)) base.divisor = T(*j.divisor);
      room[0].elements(t, from, to, base);
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

extern "C" {
int32_t metaopt_version() { return 2; }
void metaopt_run_float(const Job* j) { run<float>(*j); }
void metaopt_run_double(const Job* j) { run<double>(*j); }
}
