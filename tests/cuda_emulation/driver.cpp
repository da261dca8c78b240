// Runs gram_update of csrc/cuda on the host: `driver FOLDER key=value...`. Every operand is a raw
// file in FOLDER and lies in memory of exactly its size; the sums are written back. Prints what was
// found and counted as JSON.
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <numeric>
#include <string>

#define GHOSTED_FAST_GRAM_CHUNK_BYTES (1 << 17)  // several chunks from some thousand tokens on
#include "gram_update.cu"

namespace {

std::map<std::string, double> options;

double option(const std::string& name, double otherwise) {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : found->second;
}

class Buffer {
 public:
  explicit Buffer(const std::string& path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return;
    const std::string bytes((std::istreambuf_iterator<char>(file)), {});
    size_ = bytes.size();
    data_ = std::malloc(size_);
    std::memcpy(data_, bytes.data(), size_);
  }
  explicit Buffer(size_t size) : size_(size), data_(std::malloc(size)) {
    std::memset(data_, emulation::garbage, size);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void write_back() const {
    if (data_ == nullptr) return;
    std::ofstream(path_, std::ios::binary).write(as<const char>(), static_cast<long>(size_));
  }

 private:
  std::string path_;
  size_t size_ = 0;
  void* data_ = nullptr;
};

void print(const char* name, long long value, bool last = false) {
  std::cout << '"' << name << "\": " << value << (last ? "}\n" : ", ");
}

long long total(const int32_t (&sizes)[kSizeBuckets]) {
  return std::accumulate(sizes, sizes + kSizeBuckets, 0ll);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = std::string(argv[1]) + "/";
  for (int i = 2; i < argc; ++i) {
    const std::string text = argv[i];
    const size_t cut = text.find('=');
    options[text.substr(0, cut)] = std::stod(text.substr(cut + 1));
  }
  const Buffer x(folder + "x"), y(folder + "y"), weight(folder + "weight"), gram(folder + "gram"),
      cross(folder + "cross"), moments(folder + "moments");
  GramArgs args;
  const auto rows = [](const Buffer& buffer, const std::string& name) {
    Rows result;
    result.data = buffer.as<const void>();
    result.dtype = static_cast<Dtype>(option(name + "_dtype", 0));
    result.stride = static_cast<int64_t>(option(name + "_stride", 0));
    return result;
  };
  args.x = rows(x, "x");
  args.y = rows(y, "y");
  args.num_tokens = static_cast<int64_t>(option("num_tokens", 0));
  args.hidden_size = static_cast<int64_t>(option("hidden_size", 0));
  args.num_outputs = static_cast<int64_t>(option("num_outputs", 0));
  args.token_weight = weight.as<const float>();
  args.norm_eps = option("norm_eps", 0.0);
  args.normed = args.norm_eps > 0.0;
  args.delta = option("delta", 0) != 0;
  args.gram = gram.as<double>();
  args.cross = cross.as<double>();
  args.moments = moments.as<double>();
  emulation::shuffle_state = static_cast<uint64_t>(option("order", 1));
  emulation::garbage = static_cast<int>(option("garbage", 0xff));
  emulation::adder_terms = static_cast<int>(option("adder_terms", 8));
  emulation::adder_bits = static_cast<int>(option("adder_bits", 0));

  std::cout << '{';
  gram_update_cuda_set_device(0);
  const bool serves = gram_update_cuda_serves(&args);
  print("serves", serves, !serves);
  if (!serves) return 0;
  const bool captured = option("captured", 0) != 0;
  int error = gram_update_cuda_load();
  emulation::capturing = captured;
  const Buffer tokens(gram_update_cuda_token_bytes(&args));
  GramTokenStatus status;
  if (error == 0) error = gram_update_cuda_begin(&args, tokens.as<void>(), nullptr);
  if (captured) {
    std::memcpy(&status, tokens.as<void>(), sizeof status);  // for the test alone
  } else if (error == 0) {
    error = gram_update_cuda_read_status(tokens.as<void>(), &status, nullptr);
  }
  const bool bad =
      status.bad_weight != kNoToken || status.bad_x != kNoToken || status.bad_y != kNoToken;
  print("bad_weight", static_cast<long long>(status.bad_weight));
  print("bad_x", static_cast<long long>(status.bad_x));
  print("bad_y", static_cast<long long>(status.bad_y));
  print("check_bytes_read", emulation::counters.bytes_read);
  print("check_atomics", emulation::counters.atomics);
  print("gram_counted", total(status.gram_sizes));
  print("cross_counted", total(status.cross_sizes));
  emulation::counters = {};
  const GramTokenStatus* known = captured ? nullptr : &status;
  if (error == 0 && (captured || !bad)) {
    const Buffer operands(gram_update_cuda_operand_bytes(&args, known));
    error = gram_update_cuda_run(&args, known, tokens.as<void>(), operands.as<void>(), nullptr);
  }
  print("multiply_adds", emulation::counters.multiply_adds);
  print("bytes_read", emulation::counters.bytes_read);
  print("bytes_written", emulation::counters.bytes_written);
  print("matrix_rows", emulation::counters.matrix_rows);
  print("conflicting_rows", emulation::counters.conflicting_rows);
  print("blocks", emulation::counters.blocks);
  print("first_block", emulation::counters.first_block);
  print("last_block", emulation::counters.last_block);
  print("largest_shared_bytes", emulation::counters.largest_shared_bytes);
  print("error", error, true);
  gram.write_back();
  cross.write_back();
  moments.write_back();
  return 0;
}
