#include "bind/loaded.h"

#include <dlfcn.h>

#include <cstdio>
#include <stdexcept>

#include "cpu/tables.h"

namespace pymerge::bind {
namespace {

const KernelTable* active = nullptr;  // of the CPU
const KernelTable* cuda = nullptr;

const CpuVariant* find_variant(const std::string& name, CpuVariant* variants) {
  const int count = cpu_variants(variants);
  for (int i = count - 1; i >= 0; --i) {
    if (name == "auto" ? variants[i].supported : name == variants[i].name) return &variants[i];
  }
  return nullptr;
}

}  // namespace

std::string abi_text(uint64_t abi) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(abi));
  return text;
}

void use_isa(const std::string& name) {
  CpuVariant variants[3];
  const CpuVariant* variant = find_variant(name, variants);
  if (variant == nullptr) {
    throw std::invalid_argument("this build has no kernels for the instruction set '" + name + "'");
  }
  if (!variant->supported) {
    throw std::invalid_argument("this machine cannot run the instruction set '" + name + "'");
  }
  active = variant->table;
}

void load_cuda(const std::string& path) {
  cuda = nullptr;
  if (path.empty()) return;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  using Entry = const KernelTable* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "pymerge_cuda_table"));
  if (entry == nullptr) throw std::runtime_error(path + " is not pymerge's CUDA library");
  // If the hash differs, read nothing else: the table may have a different layout.
  const KernelTable* loaded = entry();
  if (loaded->abi != kAbi) {
    throw std::runtime_error(path + " was built from another kernel table (" +
                             abi_text(loaded->abi) + ") than pymerge._C (" + abi_text(kAbi) +
                             "); build both from the same sources: PYMERGE_CUDA=1 pip install "
                             "--force-reinstall --no-deps pymerge-kernels");
  }
  cuda = loaded;
}

const KernelTable& table(int32_t device) {
  if (device >= 0) {
    if (cuda == nullptr) throw std::runtime_error("the CUDA library is not loaded");
    return *cuda;
  }
  if (active == nullptr) use_isa("auto");
  return *active;
}

std::vector<std::pair<std::string, bool>> isa_list() {
  CpuVariant variants[3];
  const int count = cpu_variants(variants);
  std::vector<std::pair<std::string, bool>> result;
  for (int i = 0; i < count; ++i) result.emplace_back(variants[i].name, variants[i].supported);
  return result;
}

}  // namespace pymerge::bind
