// Runs the CUDA kernels of csrc/se_cuda.cu on the CPU against a float64 reference, without Python, for the sanitizers.
//
//   drive_se            every case in every order of the threads; exits with 1 where a result is wrong
//   drive_se small      one case of each kind of team, for ThreadSanitizer
//   drive_se barriers   the same with each barrier left out in turn; exits with 1 where that goes unnoticed. To be
//                       built with ThreadSanitizer: not every order of the threads shows every missing barrier
//   drive_se plans      the table of docs/kernels.md: who takes SE-ResNet50's stages on which GPU
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "se_cuda.cu"

namespace {

using se_cuda::Act;
using se_cuda::DType;
using se_cuda::GateFn;

// Multiprocessors, shared memory of a block and of a multiprocessor, L2, largest cluster: cut down, so that small
// samples meet what large ones meet on a GPU.
const se_cuda::Limits kClusters = {1, 40 << 10, 82 << 10, 1 << 20, 16};
const se_cuda::Limits kGrid = {3, 40 << 10, 82 << 10, 1 << 12, 1};
const se_cuda::Limits kRoomy = {4, 96 << 10, 100 << 10, 1 << 20, 16};

struct Case {
  const char* name;
  int N, C, H, W, R;
  DType dtype;
  bool channels_last;
  se_cuda::Limits limits;
  int offset;  // elements from a 16-byte boundary to the first of x
  Act act;
  GateFn gate_fn;
  bool bias;
};

// Those of "cluster" do not fit into one block, those of "grid" are not aligned or not dense.
const Case kCases[] = {
    {"cluster, channels-last", 3, 40, 21, 20, 6, DType::float32, true, kClusters, 0, Act::relu, GateFn::sigmoid, true},
    {"cluster, channels-last, bfloat16", 1, 256, 14, 14, 16, DType::bfloat16, true, kClusters, 0, Act::silu,
     GateFn::sigmoid, false},
    {"cluster, more channel groups than threads", 1, 1032, 5, 3, 130, DType::float32, true, kRoomy, 0, Act::relu,
     GateFn::hardsigmoid, true},
    {"cluster, NCHW", 3, 40, 21, 21, 6, DType::float32, false, kClusters, 0, Act::gelu, GateFn::sigmoid, true},
    {"cluster, NCHW, rows of whole vectors", 2, 60, 24, 20, 7, DType::bfloat16, false, kClusters, 0, Act::relu,
     GateFn::hardsigmoid, true},
    {"block, channels-last", 2, 24, 3, 4, 300, DType::float16, true, kClusters, 0, Act::relu, GateFn::sigmoid, true},
    {"grid, channels-last, vectors", 5, 40, 21, 20, 6, DType::bfloat16, true, kGrid, 0, Act::relu, GateFn::sigmoid,
     true},
    {"grid, channels-last, elements", 5, 33, 6, 5, 3, DType::float32, true, kGrid, 1, Act::silu, GateFn::sigmoid, true},
    {"grid, NCHW, vectors", 5, 60, 24, 20, 6, DType::float16, false, kGrid, 0, Act::relu, GateFn::hardsigmoid, true},
    {"grid, NCHW, elements", 5, 33, 6, 5, 20, DType::bfloat16, false, kGrid, 1, Act::gelu, GateFn::sigmoid, false},
    {"grid, one of each", 1, 1, 1, 1, 1, DType::float32, false, kGrid, 0, Act::relu, GateFn::sigmoid, true},
};
const size_t kSmall[] = {0, 3, 6, 9};

double activate(double h, Act act) {
  return act == Act::relu ? std::max(h, 0.0)
         : act == Act::silu ? h / (1 + std::exp(-h))
                            : 0.5 * h * (1 + std::erf(h / std::sqrt(2.0)));
}

double slope(double h, Act act) {
  if (act == Act::relu) {
    return h > 0;
  }
  if (act == Act::silu) {
    const double sigma = 1 / (1 + std::exp(-h));
    return sigma * (1 + h * (1 - sigma));
  }
  return 0.5 * (1 + std::erf(h / std::sqrt(2.0))) + h * std::exp(-0.5 * h * h) / std::sqrt(2 * std::acos(-1.0));
}

using Doubles = std::vector<double>;

struct Reference {
  Doubles out, dx, dw1, db1, dw2, db2;
};

// Over flat arrays in NCHW order.
Reference reference(const Case& c, const Doubles& x, const Doubles& dout, const Doubles& w1, const Doubles& b1,
                    const Doubles& w2, const Doubles& b2) {
  const int HW = c.H * c.W;
  Reference r{Doubles(x.size()), Doubles(x.size()), Doubles(w1.size()), Doubles(c.R), Doubles(w2.size()), Doubles(c.C)};
  for (int n = 0; n < c.N; ++n) {
    Doubles p(c.C), h(c.R), s(c.C), dz(c.C), dh(c.R);
    const double* xn = x.data() + size_t(n) * c.C * HW;
    const double* dn = dout.data() + size_t(n) * c.C * HW;
    for (int i = 0; i < c.C * HW; ++i) {
      p[i / HW] += xn[i] / HW;
    }
    for (int j = 0; j < c.R; ++j) {
      h[j] = c.bias ? b1[j] : 0;
      for (int i = 0; i < c.C; ++i) {
        h[j] += w1[size_t(j) * c.C + i] * p[i];
      }
    }
    for (int i = 0; i < c.C; ++i) {
      double z = c.bias ? b2[i] : 0;
      for (int j = 0; j < c.R; ++j) {
        z += w2[size_t(i) * c.R + j] * activate(h[j], c.act);
      }
      const bool sigmoid = c.gate_fn == GateFn::sigmoid;
      s[i] = sigmoid ? 1 / (1 + std::exp(-z)) : std::min(1.0, std::max(0.0, z / 6 + 0.5));
      double ds = 0;
      for (int k = 0; k < HW; ++k) {
        ds += dn[i * HW + k] * xn[i * HW + k];
      }
      dz[i] = ds * (sigmoid ? s[i] * (1 - s[i]) : s[i] > 0 && s[i] < 1 ? 1 / 6.0 : 0);
    }
    for (int j = 0; j < c.R; ++j) {
      for (int i = 0; i < c.C; ++i) {
        dh[j] += dz[i] * w2[size_t(i) * c.R + j];
        r.dw2[size_t(i) * c.R + j] += dz[i] * activate(h[j], c.act);
      }
      dh[j] *= slope(h[j], c.act);
      r.db1[j] += dh[j];
      for (int i = 0; i < c.C; ++i) {
        r.dw1[size_t(j) * c.C + i] += dh[j] * p[i];
      }
    }
    for (int i = 0; i < c.C; ++i) {
      double q = 0;
      for (int j = 0; j < c.R; ++j) {
        q += dh[j] * w1[size_t(j) * c.C + i] / HW;
      }
      r.db2[i] += dz[i];
      for (int k = 0; k < HW; ++k) {
        const size_t at = (size_t(n) * c.C + i) * HW + k;
        r.out[at] = x[at] * s[i];
        r.dx[at] = dout[at] * s[i] + q;
      }
    }
  }
  return r;
}

// Of the largest true value; infinite where a value is not finite.
double error(const std::vector<float>& actual, const Doubles& exact) {
  double worst = 0, scale = 1e-30;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = std::abs(actual[i] - exact[i]);
    worst = difference <= 1e30 ? std::max(worst, difference) : HUGE_VAL;
    scale = std::max(scale, std::abs(exact[i]));
  }
  return worst / scale;
}

template <class T>
struct Activation {
  const Case& c;
  std::vector<T> memory;
  se_cuda::View view;

  // Exactly as long as needed, for AddressSanitizer to see what goes beyond.
  Activation(const Case& c, int offset)
      : c(c), memory(size_t(c.N) * c.C * c.H * c.W + offset) {
    const int64_t HW = int64_t(c.H) * c.W;
    view = {memory.data() + offset, c.C * HW, c.channels_last ? 1 : HW, c.W * int64_t(c.channels_last ? c.C : 1),
            c.channels_last ? c.C : 1, true};
    std::memset(memory.data(), 0xff, memory.size() * sizeof(T));
  }
  // NCHW order
  T& at(size_t i) {
    const int64_t HW = int64_t(c.H) * c.W, n = i / (c.C * HW), channel = i / HW % c.C, p = i % HW;
    return static_cast<T*>(view.data)[n * view.n_stride + channel * view.c_stride + p * view.w_stride];
  }
  void fill(std::mt19937& random, Doubles& values) {
    std::normal_distribution<float> normal(0.25f);
    values.resize(size_t(c.N) * c.C * c.H * c.W);
    for (size_t i = 0; i < values.size(); ++i) {
      device::from_float(normal(random), at(i));
      values[i] = device::to_float(at(i));
    }
  }
  std::vector<float> values() {
    std::vector<float> all(size_t(c.N) * c.C * c.H * c.W);
    for (size_t i = 0; i < all.size(); ++i) {
      all[i] = device::to_float(at(i));
    }
    return all;
  }
};

std::vector<float> draw(std::mt19937& random, size_t count, double scale, Doubles& values) {
  std::normal_distribution<float> normal(0, float(scale));
  std::vector<float> drawn(count);
  for (float& value : drawn) {
    value = normal(random);
  }
  values.assign(drawn.begin(), drawn.end());
  return drawn;
}

// The largest relative error of any result; `barriers` gets how many a thread met forward and backward.
template <class T>
double run(const Case& c, int (&barriers)[2], int skip_forward, int skip_backward) {
  auto& machine = cuda_on_cpu::machine();
  machine.limits = c.limits;
  const bool grid = std::string(c.name).find("grid") == 0;
  std::mt19937 random(1);
  Doubles x_values, dout_values, w1_values, b1_values, w2_values, b2_values;
  Activation<T> x(c, c.offset), dout(c, c.offset), out(c, c.offset), dx(c, c.offset);
  x.fill(random, x_values);
  dout.fill(random, dout_values);
  const auto w1 = draw(random, size_t(c.R) * c.C, 1 / std::sqrt(c.C), w1_values), b1 = draw(random, c.R, 1, b1_values);
  const auto w2 = draw(random, size_t(c.R) * c.C, 2 / std::sqrt(c.R), w2_values), b2 = draw(random, c.C, 1, b2_values);
  const auto poisoned = [](size_t count) { return std::vector<float>(count, NAN); };
  auto pooled = poisoned(size_t(c.N) * c.C), gate = pooled, dz = pooled;
  auto hidden = poisoned(size_t(c.N) * c.R), dhidden = hidden;
  auto dw1 = poisoned(w1.size()), db1 = poisoned(c.R), dw2 = poisoned(w2.size()), db2 = poisoned(c.C);

  const se_cuda::Shape shape = {c.N, c.C, c.H, c.W, c.R, c.dtype, c.act, c.gate_fn, c.channels_last};
  const se_cuda::Plan plan = se_cuda::plan(shape, c.limits, {x.view, out.view});
  const bool cluster = plan.on_chip && plan.team > 1;
  if (plan.on_chip == grid || cluster != (std::string(c.name).find("cluster") == 0)) {
    std::printf("%s: not the kind of team that was meant\n", c.name);
    std::exit(1);
  }
  const size_t board_floats = size_t(c.N) * plan.team * plan.board;

  auto board = poisoned(board_floats);
  std::vector<int> counters(1 + c.N, 0);
  se_cuda::Forward forward = {shape, x.view, out.view, w1.data(), c.bias ? b1.data() : nullptr,
                              w2.data(), c.bias ? b2.data() : nullptr, pooled.data(), hidden.data(), gate.data()};
  machine.skipped_barrier = skip_forward;
  se_cuda::forward(forward, plan, board.data(), counters.data(), nullptr);
  barriers[0] = machine.most_barriers;

  board = poisoned(board_floats);
  counters.assign(1 + c.N, 0);
  se_cuda::Backward backward = {shape, dout.view, x.view, dx.view, w1.data(), w2.data(), hidden.data(), gate.data(),
                                dz.data(), dhidden.data()};
  machine.skipped_barrier = skip_backward;
  se_cuda::backward(backward, plan, board.data(), counters.data(), nullptr);
  barriers[1] = machine.most_barriers;
  machine.skipped_barrier = -1;
  se_cuda::weight_grad({c.N, c.C, c.R, true, c.act, dz.data(), hidden.data(), dw2.data(), db2.data()}, nullptr);
  se_cuda::weight_grad({c.N, c.R, c.C, false, c.act, dhidden.data(), pooled.data(), dw1.data(), db1.data()}, nullptr);

  const Reference exact = reference(c, x_values, dout_values, w1_values, b1_values, w2_values, b2_values);
  double worst = std::max(error(dw1, exact.dw1), error(dw2, exact.dw2));
  worst = std::max({worst, error(db1, exact.db1), error(db2, exact.db2)});
  const double rounding = c.dtype == DType::float32 ? 1 : c.dtype == DType::float16 ? 1 / 256.0 : 1 / 2048.0;
  return std::max({worst, rounding * error(out.values(), exact.out), rounding * error(dx.values(), exact.dx)});
}

double run(const Case& c, int (&barriers)[2], int skip_forward = -1, int skip_backward = -1) {
  switch (c.dtype) {
    case DType::float32:
      return run<float>(c, barriers, skip_forward, skip_backward);
    case DType::bfloat16:
      return run<device::bfloat16>(c, barriers, skip_forward, skip_backward);
    default:
      return run<device::float16>(c, barriers, skip_forward, skip_backward);
  }
}

void print_plans() {
  const struct {
    const char* name;
    se_cuda::Limits limits;
  } gpus[] = {{"sm_80 (A100)", {108, 163 << 10, 164 << 10, 40 << 20, 1}},
              {"sm_86 (RTX 3090)", {82, 99 << 10, 100 << 10, 6 << 20, 1}},
              {"sm_89 (RTX 4090)", {128, 99 << 10, 100 << 10, 72 << 20, 1}},
              {"sm_90 (H100, H200)", {132, 227 << 10, 228 << 10, 50 << 20, 16}},
              {"sm_100 (B200)", {148, 227 << 10, 228 << 10, 126 << 20, 16}},
              {"sm_120 (RTX 5090)", {170, 99 << 10, 100 << 10, 96 << 20, 8}}};
  const int stages[][2] = {{256, 56}, {512, 28}, {1024, 14}, {2048, 7}};
  std::puts("| N = 256 | stage 1 | stage 2 | stage 3 | stage 4 |\n|---|---|---|---|---|");
  alignas(16) char somewhere[16];
  for (const auto& gpu : gpus) {
    for (const DType dtype : {DType::bfloat16, DType::float32}) {
      std::printf("| %s, %s |", gpu.name, dtype == DType::float32 ? "float32" : "half");
      for (const auto& [C, side] : stages) {
        const se_cuda::Shape shape = {256, C, side, side, C / 16, dtype, Act::relu, GateFn::sigmoid, true};
        const se_cuda::View view = {somewhere, int64_t(C) * side * side, 1, int64_t(C) * side, C, true};
        const se_cuda::Plan plan = se_cuda::plan(shape, gpu.limits, {view});
        if (plan.on_chip) {
          std::printf(" %d x %.1f KiB |", plan.team, plan.shared / 1024.0);
        } else {
          std::printf(" L2, %d |", plan.team);
        }
      }
      std::puts("");
    }
  }
}

// Of a float32 computation; results in a half type have been divided by what their rounding adds.
constexpr double kTolerance = 4e-6;

// Whether a run is wrong, or ends its process: what is missing may be what a thread waits for.
template <class F>
bool fails(F error_of) {
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    _exit(error_of() < kTolerance ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "plans") {
    print_plans();
    return 0;
  }
  std::vector<Case> cases;
  if (mode.empty()) {
    cases.assign(std::begin(kCases), std::end(kCases));
  } else {
    for (const size_t i : kSmall) {
      cases.push_back(kCases[i]);
      cases.back().N = mode == "barriers" ? 1 : 2;
    }
  }
  const cuda_on_cpu::Order orders[] = {cuda_on_cpu::Order::ascending, cuda_on_cpu::Order::descending,
                                       cuda_on_cpu::Order::block_by_block};
  auto& machine = cuda_on_cpu::machine();
  bool ok = true;
  for (const Case& c : cases) {
    int barriers[2];
    for (const auto order : orders) {
      machine.order = order;
      const double worst = run(c, barriers);
      std::printf("%s, order %d: error %.1e\n", c.name, int(order), worst);
      ok = ok && worst < kTolerance;
    }
    if (mode != "barriers") {
      continue;
    }
    for (int pass = 0; pass < 2; ++pass) {
      for (int skipped = 0, count = barriers[pass]; skipped < count; ++skipped) {
        bool noticed = false;
        for (const auto order : orders) {
          machine.order = order;
          noticed = noticed || fails([&] { return run(c, barriers, pass ? -1 : skipped, pass ? skipped : -1); });
        }
        std::printf("%s, %s without barrier %d of %d: %s\n", c.name, pass ? "backward" : "forward", skipped, count,
                    noticed ? "noticed" : "NOT noticed");
        ok = ok && noticed;
      }
    }
  }
  std::puts(ok ? "ok" : "FAILED");
  return ok ? 0 : 1;
}
