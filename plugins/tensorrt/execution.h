// A program in an execution context: its kernels loaded, its steps laid out for the sizes at hand, and launched.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "modules.h"
#include "program.h"
#include "tensor_map.h"

namespace moevlm::tensorrt {

// Addresses on the device, as TensorRT hands them over. Inputs that the program marks as written are written to though
// they are const here: a cache is an input of the network that no other layer reads.
struct Pointers {
  const void* const* inputs;
  void* const* outputs;
  char* workspace;

  // Throws std::invalid_argument naming one that is null or not aligned.
  void check(const Program& program, bool has_workspace) const;
};

// All calls throw std::invalid_argument for what the program is not for, std::runtime_error if the driver does.
class Execution {
 public:
  // is_build: a builder's thread, which may have no CUDA context; then the primary one is taken for each call.
  Execution(std::shared_ptr<const Program> program, bool is_build)
      : program_(std::move(program)), is_build_(is_build) {}

  // Into the current context; once, unless it is used with another device.
  void load();
  // For executions of these sizes.
  void prepare(const Sizes& sizes);
  void run(const Sizes& sizes, const Pointers& pointers, void* stream);

 private:
  // A step at certain sizes: a launch's grid, or the words of a fill.
  struct Extent {
    unsigned grid[3];
    size_t words;
  };

  std::optional<Current> enter();
  void lay_out(const Sizes& sizes);
  void lay_out_maps(const Sizes& sizes);
  void launch(const Launch& launch, const Extent& extent, const Pointers& pointers, void* stream);
  uint64_t value(const Argument& argument, const Pointers& pointers) const;
  std::string name_of(const Argument& source) const;
  Wide bytes_of(const Argument& source, const Sizes& sizes) const;

  std::shared_ptr<const Program> program_;
  bool is_build_;
  std::shared_ptr<const PrimaryContext> primary_;  // outlives the modules in it
  std::shared_ptr<const Modules> modules_;
  Sizes sizes_{};  // what the following was made for; zeros for nothing
  const Variant* variant_ = nullptr;
  std::vector<size_t> offsets_;  // of the buffers in the workspace
  size_t workspace_ = 0;         // bytes of them all
  std::vector<Extent> extents_;  // of the steps
  std::vector<EncodedMap> maps_;
  std::vector<uint64_t> values_;
  std::vector<void*> parameters_;  // to values_, or to maps_
};

}  // namespace moevlm::tensorrt
