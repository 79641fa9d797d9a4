// Updates of lists of tensors, all operations on a block of elements while it is in the cache.
//
// A program has one pass over the elements, or several: sums over a tensor end a pass, numbers that follow from them are
// worked out for each tensor, and the next pass may use them. Several passes go over one batch of tensors after the other,
// which the processor's outer cache holds.
//
// The interface is C: the library knows neither Python nor torch. A program is a list of instructions on elements. The
// arithmetic is that of torch's own kernels, operation by operation, so that a run may go on with or without the library.
// torch's compiler has fused some products with sums: `Rounding` says in which way, and who calls finds it out by
// comparing bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
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
static const i64 CHUNK = 1 << 13;   // elements that are added up by one thread, whatever the number of threads
static const i64 BATCH = 1 << 19;   // elements that go through all passes before the next ones do; a larger tensor by itself
static const int REGISTERS = 12, NUMBERS = 64;

// the last ones do the work of two to seven operations, in one loop and rounded as these are: see `Worker::single`
enum Op {
  MOVE, ADD, SUB, MUL, DIV, LT, LE, GT, SELECT, SQRT, ABS, NEG, HYPOT, MAX, LERP, ADDCMUL, ADAM, SGD,
  DOT, DOTS, MEAN, PASS, MUL_ADD, MUL_ADDCMUL, ADDCMUL_ADD, MUL_LT, MUL_LE, MUL_GT, DECAY_ADD, TURN_DECAY_ADD
};
// where an operand is: a block of working memory, a block of a tensor, a number of the program, a number of each tensor, a
// block of the memory that one pass leaves to the next; the last number of the program is the divisor of the gradients
enum Place { REGISTER, TENSOR, NUMBER, OF_TENSOR, SCRATCH };
// how a product and a sum round: twice, or once with the first product of the two fused, or with the last
enum Rounding { TWICE, FIRST, LAST };

extern "C" {
struct Instruction { int32_t op, to, a, b, c, d, e, f; };
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

// ---- sums

// the sum of a block: of lanes in the precision of the elements, which are added up in double precision
template <class T> struct Lanes {
  static const i64 WIDTH = 32 / sizeof(T), COUNT = 2 * WIDTH;
  typedef T Vector __attribute__((vector_size(32)));
  typedef T Loose __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  Vector even{}, odd{};
  T rest = 0;

  static const Loose& load(const T* at) { return *(const Loose*)at; }
  template <class F> void add(i64 i, F f) { even += f(i), odd += f(i + WIDTH); }
  double total() const {
    double t = rest;
    for (i64 l = 0; l < WIDTH; l++) t += double(even[l]) + double(odd[l]);
    return t;
  }
};

// the sums of a a, a b and b b
template <class T> struct Dots {
  typedef Lanes<T> L;
  L first, second, third;

  // of `L::COUNT` elements
  void add(const T* a, const T* b) {
    first.add(0, [=](i64 k) { return L::load(a + k) * L::load(a + k); });
    second.add(0, [=](i64 k) { return L::load(a + k) * L::load(b + k); });
    third.add(0, [=](i64 k) { return L::load(b + k) * L::load(b + k); });
  }
  void add(const T* a, const T* b, i64 n) {
    const i64 whole = n - n % L::COUNT;
    for (i64 i = 0; i < whole; i += L::COUNT) add(a + i, b + i);
    for (i64 i = whole; i < n; i++) first.rest += a[i] * a[i], second.rest += a[i] * b[i], third.rest += b[i] * b[i];
  }
  void end(double* to) const { to[0] += first.total(), to[1] += second.total(), to[2] += third.total(); }
};

// add what a block adds to the sum of a b, or of a
template <class T> static void add_up(int op, const T* a, const T* b, i64 n, double* to) {
  typedef Lanes<T> L;
  L sum;
  const i64 whole = n - n % L::COUNT;
  if (op == DOT) {
    for (i64 i = 0; i < whole; i += L::COUNT) sum.add(i, [=](i64 k) { return L::load(a + k) * L::load(b + k); });
    for (i64 i = whole; i < n; i++) sum.rest += a[i] * b[i];
  } else {
    for (i64 i = 0; i < whole; i += L::COUNT) sum.add(i, [=](i64 k) { return L::load(a + k); });
    for (i64 i = whole; i < n; i++) sum.rest += a[i];
  }
  to[0] += sum.total();
}

// ---- torch's optimizers: the new weights, less what the caller has; for the weights themselves that is 0

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

// what a base's instruction is made of; `less` is what the caller has of the new weights
template <class T> struct Lists {
  T* to;
  const T *p, *g;
  T *m, *v;  // null where the base keeps none
  const T* less;

  Lists from(i64 k) const { return {to + k, p + k, g + k, m ? m + k : m, v ? v + k : v, less + k}; }
};

// `sums`, if not null, adds up the weights and what comes out, for a multiple of `Lanes::COUNT` elements
template <int R, bool NEAR, bool DIVIDES, class T> static void adam(const Lists<T>& lists, const Base<T>& s, i64 n, Dots<T>* sums) {
  const T far = s.first - T(1), decay = s.decay, first = s.first, second = s.second, second_rest = s.second_rest, root = s.root,
          eps = s.eps, step = s.step, sign = s.sign, divisor = s.divisor, l2 = s.l2;
  T *const to = lists.to, *const m = lists.m, *const v = lists.v;
  const T *const p = lists.p, *const g = lists.g, *const less = lists.less;
#define ADAM_LOOP(FROM, END, GRADIENT)                                        \
  EACH_LANE for (i64 i = FROM; i < END; i++) {                                \
    const T raw = (DIVIDES ? g[i] / divisor : g[i]) * sign, x = GRADIENT, d = x - m[i]; \
    const T mean = NEAR ? fused<R>(first, d, m[i]) : fused<R>(far, d, x);     \
    const T square = both<R>(v[i], second, second_rest * x, x);               \
    m[i] = mean, v[i] = square;                                               \
    to[i] = p[i] * decay - (step * mean) / (std::sqrt(square) / root + eps) - less[i]; \
  }
  const i64 WIDTH = Lanes<T>::COUNT;
  if (l2 != 0) { ADAM_LOOP(0, n, fused<R>(p[i], l2, raw)) }
  else if (!sums) { ADAM_LOOP(0, n, raw) }
  else for (i64 at = 0; at < n; at += WIDTH) { ADAM_LOOP(at, at + WIDTH, raw) sums->add(p + at, to + at); }
  if (l2 != 0 && sums) sums->add(p, to, n);
}

template <int R, class T> static void adam(const Lists<T>& lists, const Base<T>& s, i64 n, Dots<T>* sums) {
  const bool near = std::abs(s.first) < T(0.5);
  if (s.divides) near ? adam<R, true, true>(lists, s, n, sums) : adam<R, false, true>(lists, s, n, sums);
  else near ? adam<R, true, false>(lists, s, n, sums) : adam<R, false, false>(lists, s, n, sums);
}

template <int R, class T> static void sgd(const Lists<T>& lists, const Base<T>& s, i64 n) {
  const T rate = s.rate, l2 = s.l2, momentum = s.momentum, rest = s.rest, sign = s.sign, divisor = s.divides ? s.divisor : T(1);
  T *const to = lists.to, *const b = lists.m;
  const T *const p = lists.p, *const g = lists.g, *const less = lists.less;
#define SGD_LOOP(STEP)                                      \
  EACH_LANE for (i64 i = 0; i < n; i++) {                   \
    const T raw = g[i] / divisor * sign, x = l2 != 0 ? fused<R>(p[i], l2, raw) : raw; \
    to[i] = fused<R>(STEP, rate, p[i]) - less[i];           \
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

// ---- numbers of a tensor

static bool is_sum(const Instruction& q) { return q.op == DOT || q.op == DOTS || q.op == MEAN; }

template <class T> static T number(int op, T x, T y, T z) {
  switch (op) {
    case MOVE: return x;
    case ADD: return x + y;
    case SUB: return x - y;
    case MUL: return x * y;
    case DIV: return x / y;
    case LT: return x < y;
    case LE: return x <= y;
    case GT: return x > y;
    case SELECT: return x != 0 ? y : z;
    case SQRT: return std::sqrt(x);
    case ABS: return std::abs(x);
    case NEG: return -x;
    case HYPOT: return std::hypot(x, y);
    case MAX: return x > y || x != x ? x : y;
    case LERP: return x + z * (y - x);
    default: return x + y * z;  // ADDCMUL
  }
}

// ---- a program

// what a pass does to the elements, and to the numbers of each tensor behind it
struct Pass { std::vector<Instruction> elements, numbers; };

// what all threads share
template <class T> struct Shared {
  const Job& j;
  std::vector<Pass> passes{1};
  i64 own = 0;                  // numbers of each tensor
  std::vector<i64> chunk, room; // of each tensor: its first chunk, and its place in the memory between passes
  std::vector<i64> batch{0};    // the first tensor of each batch, and the end
  std::vector<double> sums;     // by chunk
  std::vector<T> numbers;       // by tensor
  T* scratch = nullptr;

  explicit Shared(const Job& job) : j(job) {
    for (const Instruction* q = j.code; q < j.code + j.length; q++) {
      if (q->op == PASS) passes.emplace_back();
      else (q->to >> KIND == OF_TENSOR && !is_sum(*q) ? passes.back().numbers : passes.back().elements).push_back(*q);
      if (q->to >> KIND == OF_TENSOR) own = std::max<i64>(own, (q->to & INDEX) + (q->op == DOTS ? 3 : 1));
    }
    i64 chunks = 0, filled = 0, most = 0;
    for (i64 t = 0; t < j.tensors && passes.size() > 1; t++) {
      const i64 size = (j.size[t] + ALIGNED - 1) & ~(ALIGNED - 1);
      if (filled && filled + size > BATCH) batch.push_back(t), filled = 0;
      chunk.push_back(chunks), chunks += (size + CHUNK - 1) / CHUNK;
      room.push_back(filled), most = std::max(most, filled += size);
    }
    chunk.push_back(chunks), batch.push_back(j.tensors);
    sums.assign(chunks * own, 0), numbers.assign(j.tensors * own, 0);
    static thread_local std::vector<T> kept;  // clearing new memory in every update would take longer than the arithmetic
    if ((i64)kept.size() < most) kept.resize(most);
    scratch = kept.data();
  }

  // work the numbers of a tensor out from the sums of a pass
  void end(const Pass& pass, i64 t) {
    T* mine = numbers.data() + t * own;
    auto value = [&](int32_t o) { return o >> KIND == OF_TENSOR ? mine[o & INDEX] : T(j.number[o & INDEX]); };
    for (const Instruction& q : pass.elements) {
      for (i64 i = q.to & INDEX, k = i + (q.op == DOTS ? 3 : 1); is_sum(q) && i < k; i++) {
        double total = 0;
        for (i64 c = chunk[t]; c < chunk[t + 1]; c++) total += sums[c * own + i];
        mine[i] = q.op == MEAN ? T(total) / T(std::max<i64>(1, j.size[t])) : T(total);
      }
    }
    for (const Instruction& q : pass.numbers) mine[q.to & INDEX] = number<T>(q.op, value(q.a), value(q.b), value(q.c));
  }
};

template <class T> struct Worker {
  Shared<T>& all;
  const Job& j;
  alignas(64) T zeros[BLOCK] = {};
  // a processor takes addresses that are 4 KB apart for the same
  alignas(64) T registers[REGISTERS][BLOCK + ALIGNED];
  T numbers[NUMBERS];
  const i64 width;

  explicit Worker(Shared<T>& shared) : all(shared), j(shared.j), width(j.vector / sizeof(T)) {
    for (int i = 0; i < NUMBERS; i++) numbers[i] = T(j.number[i]);
    numbers[NUMBERS - 1] = j.divisor ? T(*j.divisor) : T(1);
  }

  // take a part of one tensor through a pass; `from` is a multiple of ALIGNED
  void elements(const Pass& pass, i64 tensor, i64 from, i64 to, const Base<T>& base) {
    const i64 size = j.size[tensor];
    for (i64 at = from; at < to; at += BLOCK) {
      const i64 n = std::min(BLOCK, to - at), rest = at + n == size ? size % width : 0;
      auto place = [&](int32_t o) -> Operand<T> {
        const int kind = o >> KIND, index = o & INDEX;
        if (kind == REGISTER) return {registers[index], true};
        if (kind == NUMBER) return {numbers + index, false};
        if (kind == OF_TENSOR) return {all.numbers.data() + tensor * all.own + index, false};
        if (kind == SCRATCH) return {all.scratch + all.room[tensor] + at, true};
        return {(T*)j.address[index * j.tensors + tensor] + at, true};
      };
      auto sums = [&](const Instruction& q) { return &all.sums[(all.chunk[tensor] + at / CHUNK) * all.own + (q.to & INDEX)]; };
      for (auto i = pass.elements.begin(); i != pass.elements.end(); i++) {
        const Instruction& q = *i;
        if (q.op == ADAM || q.op == SGD) {
          T* const p = place(q.a).at;
          T *m = q.c ? place(q.c).at : nullptr, *v = q.op == ADAM ? place(q.c + 1).at : nullptr;
          const Lists<T> lists{place(q.to).at, p, place(q.b).at, m, v, q.d ? p : zeros};
          // sums of the weights and of what comes out are added up while the next weights are on their way from memory
          const bool sums_follow = i + 1 != pass.elements.end() && i[1].op == DOTS && i[1].a == q.a && i[1].b == q.to;
          const bool adds = sums_follow && q.op == ADAM && n % Lanes<T>::COUNT == 0;
          Dots<T> dots;
          step(j.rounding, lists, base, n - rest, adds ? &dots : nullptr);
          if (rest) step(j.rest_rounding, lists.from(n - rest), base, rest, nullptr);
          if (adds) dots.end(sums(*++i));
        } else if (q.op == DOTS) {
          Dots<T> dots;
          dots.add(place(q.a).at, place(q.b).at, n), dots.end(sums(q));
        } else if (is_sum(q)) add_up<T>(q.op, place(q.a).at, place(q.b).at, n, sums(q));
        else single(q, place(q.to).at, place(q.a), place(q.b), place(q.c), place(q.d), place(q.e), place(q.f), n);
      }
    }
  }

  void step(i64 rounding, const Lists<T>& lists, const Base<T>& base, i64 n, Dots<T>* dots) {
    by_rounding(rounding, [&](auto r) {
      lists.v ? adam<decltype(r)::value>(lists, base, n, dots) : sgd<decltype(r)::value>(lists, base, n);
    });
  }

  void single(const Instruction& q, T* d, Operand<T> a, Operand<T> b, Operand<T> c, Operand<T> e, Operand<T> f, Operand<T> g, i64 n) {
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
      case MUL_ADD: { const T y = *b.at; EACH_LANE for (i64 i = 0; i < n; i++) d[i] = a.at[i] * y + c.at[i]; break; }
      case MUL_ADDCMUL:
        by_fusion(j.product_rounding, [&](auto r) {
          const T y = *b.at, z = *e.at;
          EACH_LANE for (i64 i = 0; i < n; i++) d[i] = fused<decltype(r)::value>(c.at[i], z, a.at[i] * y);
        });
        break;
      case ADDCMUL_ADD:
        by_fusion(j.product_rounding, [&](auto r) {
          EACH_LANE for (i64 i = 0; i < n; i++) d[i] = fused<decltype(r)::value>(b.at[i], c.at[i], a.at[i]) + e.at[i];
        });
        break;
      case MUL_LT: compare(d, a, b, c, e, n, [](T x, T y) { return x < y; }); break;
      case MUL_LE: compare(d, a, b, c, e, n, [](T x, T y) { return x <= y; }); break;
      case MUL_GT: compare(d, a, b, c, e, n, [](T x, T y) { return x > y; }); break;
      case DECAY_ADD: case TURN_DECAY_ADD:
        by_fusion(j.product_rounding, [&](auto r) {
          constexpr int R = decltype(r)::value;
          const T bound = *c.at, yes = *e.at, no = T(0) * yes;
          auto decayed = [=](T update, T weight) { return fused<R>(update * weight <= bound ? yes : no, weight, update) + weight; };
          if (q.op == DECAY_ADD) { EACH_LANE for (i64 i = 0; i < n; i++) d[i] = decayed(a.at[i], b.at[i]); return; }
          const T scale = *f.at, more = *g.at;
          EACH_LANE for (i64 i = 0; i < n; i++) d[i] = decayed(fused<R>(b.at[i], more, a.at[i] * scale), b.at[i]);
        });
        break;
    }
  }

  // two lists are multiplied and compared with a number, and the truth, 1 or 0, is multiplied by another
  template <class F> static void compare(T* d, Operand<T> a, Operand<T> b, Operand<T> c, Operand<T> e, i64 n, F f) {
    const T bound = *c.at, yes = *e.at, no = T(0) * yes;
    EACH_LANE for (i64 i = 0; i < n; i++) d[i] = f(a.at[i] * b.at[i], bound) ? yes : no;
  }
};

template <class T> static void run(const Job& j) {
  const i64 elements = std::accumulate(j.size, j.size + j.tensors, i64(0));
  std::vector<float> counts(j.count ? j.tensors : 0);
  for (size_t t = 0; t < counts.size(); t++) counts[t] = *(float*)j.count[t] += 1;
  const i64 threads = elements < SERIAL ? 1 : j.threads;
  Shared<T> all(j);
  const i64 grain = all.passes.size() > 1 ? CHUNK : ALIGNED;
  auto work = [&](i64 me, i64 of, auto wait) {
    std::vector<Worker<T>> room;  // on the heap: too large for the stack of a thread
    room.reserve(1);
    room.emplace_back(all);
    Base<T> base = sgd_settings<T>(j);
    float count = -1;
    for (size_t b = 0; b + 1 < all.batch.size(); b++) {
      const i64 first = all.batch[b], end = all.batch[b + 1], sum = std::accumulate(j.size + first, j.size + end, i64(0));
      const i64 low = sum * me / of, high = sum * (me + 1) / of;
      for (const Pass& pass : all.passes) {
        i64 at = 0;
        for (i64 t = first; t < end; at += j.size[t++]) {
          const i64 size = j.size[t];
          auto cut = [&](i64 x) { return x <= 0 ? 0 : x >= size ? size : x & ~(grain - 1); };
          const i64 from = cut(low - at), to = cut(high - at);
          if (from >= to) continue;
          if (j.count && counts[t] != count) base = adam_settings<T>(j, count = counts[t]);
          if ((base.divides = j.divisor != nullptr)) base.divisor = T(*j.divisor);
          room[0].elements(pass, t, from, to, base);
        }
        if (all.passes.size() > 1) wait();
        if (&pass == &all.passes.back()) continue;
        for (i64 t = first + me; t < end; t += of) all.end(pass, t);
        wait();
      }
    }
  };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
    return;
  }
#endif
  work(0, 1, [] {});
}

extern "C" {
int32_t metaopt_version() { return 5; }
// where tensors begin: `begin` is torch's, for one of its objects; who calls holds the objects and Python's lock
void metaopt_begins(void* (*begin)(void*), void* const* objects, i64 n, u64* to) {
  for (i64 i = 0; i < n; i++) to[i] = (u64)begin(objects[i]);
}
void metaopt_run_float(const Job* j) { run<float>(*j); }
void metaopt_run_double(const Job* j) { run<double>(*j); }
}
