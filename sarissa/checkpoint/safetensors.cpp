#include "sarissa/checkpoint/safetensors.h"

#include <ATen/ops/empty.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <tuple>

#include "sarissa/base/error.h"
#include "sarissa/base/json.h"

namespace sarissa::checkpoint {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr int kMaxHeaderDepth = 4;                 // header, tensor, shape; one to spare

struct DTypeName {
  const char* name;
  at::ScalarType type;
};
constexpr DTypeName kDTypes[] = {
    {"F64", at::kDouble},
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I64", at::kLong},
    {"I32", at::kInt},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
    {"F8_E4M3", at::kFloat8_e4m3fn},
};

const char* dtype_name(at::ScalarType type) {
  for (const auto& d : kDTypes) {
    if (d.type == type) return d.name;
  }
  throw Error(str("safetensors has no name for dtype ", c10::toString(type)));
}

void write_all(int fd, const void* data, size_t size, const std::filesystem::path& path) {
  auto* bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = ::write(fd, bytes, std::min<size_t>(size, 1u << 30));
    if (n < 0 && errno == EINTR) continue;
    SARISSA_CHECK(n >= 0, "cannot write ", path.string(), ": ", std::strerror(errno));
    bytes += n, size -= static_cast<size_t>(n);
  }
}

/// Closes the descriptor on every way out.
struct FileDescriptor {
  int fd;
  ~FileDescriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

struct SafetensorsFile::Impl {
  struct Entry {
    at::ScalarType dtype;
    std::vector<int64_t> shape;
    uint64_t begin, end;  // bytes from the start of the data
  };
  std::filesystem::path path;
  void* mapping = nullptr;
  uint64_t size = 0;
  uint64_t data_begin = 0;
  std::vector<std::string> names;
  std::map<std::string, Entry> entries;
  std::map<std::string, std::string> metadata;

  ~Impl() {
    if (mapping != nullptr) ::munmap(mapping, size);
  }

  const Entry& entry(const std::string& name) const {
    const auto it = entries.find(name);
    SARISSA_CHECK(it != entries.end(), path.string(), " has no tensor '", name, "'",
                  did_you_mean(name, names));
    return it->second;
  }

  void parse_header();
  Entry parse_entry(const std::string& name, const nlohmann::json& value) const;
};

SafetensorsFile::Impl::Entry SafetensorsFile::Impl::parse_entry(const std::string& name,
                                                                const nlohmann::json& value) const {
  const auto fail = [&](const char* what) {
    throw Error(str(path.string(), ": tensor '", name, "' has ", what));
  };
  if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") ||
      !value.contains("data_offsets")) {
    fail("no dtype, shape or data_offsets");
  }
  const auto& dtype = value["dtype"];
  const auto& shape = value["shape"];
  const auto& offsets = value["data_offsets"];
  if (!dtype.is_string() || !shape.is_array() || !offsets.is_array() || offsets.size() != 2 ||
      !offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) {
    fail("a malformed dtype, shape or data_offsets");
  }
  Entry entry{};
  const auto known = std::find_if(std::begin(kDTypes), std::end(kDTypes), [&](const DTypeName& d) {
    return d.name == dtype.get_ref<const std::string&>();
  });
  if (known == std::end(kDTypes)) fail("an unknown dtype");
  entry.dtype = known->type;
  uint64_t bytes = c10::elementSize(entry.dtype);
  uint64_t strides = 1;  // extents of 0 left out: torch multiplies strides that way
  if (shape.size() > 64) fail("more than 64 dimensions");
  for (const auto& extent : shape) {
    if (!extent.is_number_unsigned()) fail("a shape that is not of non-negative integers");
    const auto n = extent.get<uint64_t>();
    if (n > INT64_MAX || __builtin_mul_overflow(bytes, n, &bytes) ||
        __builtin_mul_overflow(strides, std::max<uint64_t>(n, 1), &strides) ||
        strides > INT64_MAX) {
      fail("a shape that overflows");
    }
    entry.shape.push_back(static_cast<int64_t>(n));
  }
  entry.begin = offsets[0].get<uint64_t>();
  entry.end = offsets[1].get<uint64_t>();
  if (entry.begin > entry.end || entry.end > size - data_begin) {
    fail("data outside the file (truncated?)");
  }
  if (entry.end - entry.begin != bytes) fail("a size that differs from its shape and dtype");
  return entry;
}

void SafetensorsFile::Impl::parse_header() {
  SARISSA_CHECK(size >= 8, path.string(), ": too short for a safetensors file (", size, " bytes)");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, mapping, 8);
  SARISSA_CHECK(header_bytes <= kMaxHeaderBytes && header_bytes <= size - 8, path.string(),
                ": not a safetensors file, or truncated (header of ", header_bytes,
                " bytes in a file of ", size, ")");
  data_begin = 8 + header_bytes;
  const std::string_view text(static_cast<const char*>(mapping) + 8, header_bytes);
  const auto header = parse_json_object<nlohmann::json>(
      text, path.string() + ": safetensors header", kMaxHeaderDepth);
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      SARISSA_CHECK(value.is_object(), path.string(), ": __metadata__ is not an object");
      for (const auto& [key, text_value] : value.items()) {
        SARISSA_CHECK(text_value.is_string(), path.string(), ": __metadata__ '", key,
                      "' is not a string");
        metadata[key] = text_value.get<std::string>();
      }
      continue;
    }
    const Entry entry = parse_entry(name, value);
    entries.emplace(name, entry);
    names.push_back(name);
    if (entry.begin < entry.end) ranges.emplace_back(entry.begin, entry.end);
  }
  std::sort(names.begin(), names.end(), [this](const std::string& a, const std::string& b) {
    const Entry &x = entries.at(a), &y = entries.at(b);
    return std::tie(x.begin, x.end, a) < std::tie(y.begin, y.end, b);
  });
  // The format leaves no byte unused: a hole or a tail means a damaged or doctored file.
  std::sort(ranges.begin(), ranges.end());
  uint64_t covered = 0;
  for (const auto& [begin, end] : ranges) {
    SARISSA_CHECK(begin >= covered, path.string(), ": tensors overlap at byte ", begin);
    SARISSA_CHECK(begin == covered, path.string(), ": bytes ", covered, " to ", begin,
                  " of the data belong to no tensor");
    covered = end;
  }
  SARISSA_CHECK(covered == size - data_begin, path.string(), ": ", size - data_begin - covered,
                " bytes after the last tensor");
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  const FileDescriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  SARISSA_CHECK(file.fd >= 0, "cannot open ", path.string(), ": ", std::strerror(errno));
  struct stat info {};
  SARISSA_CHECK(::fstat(file.fd, &info) == 0 && S_ISREG(info.st_mode), path.string(),
                ": not a regular file");
  impl_->size = static_cast<uint64_t>(info.st_size);
  SARISSA_CHECK(impl_->size >= 8, path.string(), ": too short for a safetensors file (",
                impl_->size, " bytes)");
  void* mapping = ::mmap(nullptr, impl_->size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  SARISSA_CHECK(mapping != MAP_FAILED, "cannot map ", path.string(), ": ", std::strerror(errno));
  impl_->mapping = mapping;
  impl_->parse_header();
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;

const std::vector<std::string>& SafetensorsFile::names() const { return impl_->names; }
bool SafetensorsFile::contains(const std::string& name) const {
  return impl_->entries.contains(name);
}
const std::map<std::string, std::string>& SafetensorsFile::metadata() const {
  return impl_->metadata;
}
std::vector<int64_t> SafetensorsFile::shape(const std::string& name) const {
  return impl_->entry(name).shape;
}
at::ScalarType SafetensorsFile::dtype(const std::string& name) const {
  return impl_->entry(name).dtype;
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const Impl::Entry& entry = impl_->entry(name);
  at::Tensor result = at::empty(entry.shape, at::TensorOptions().dtype(entry.dtype));
  if (entry.begin < entry.end) {
    std::memcpy(result.mutable_data_ptr(),
                static_cast<const char*>(impl_->mapping) + impl_->data_begin + entry.begin,
                entry.end - entry.begin);
  }
  return result;
}

void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    SARISSA_CHECK(name != "__metadata__" && !header.contains(name), path.string(),
                  ": two tensors named '", name, "'");
    const uint64_t bytes = tensor.numel() * tensor.element_size();
    header[name] = {{"dtype", dtype_name(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // aligns the data to 8 bytes

  const FileDescriptor file{::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)};
  SARISSA_CHECK(file.fd >= 0, "cannot write ", path.string(), ": ", std::strerror(errno));
  const uint64_t header_bytes = text.size();
  write_all(file.fd, &header_bytes, 8, path);
  write_all(file.fd, text.data(), text.size(), path);
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor packed = tensor.detach().to(at::kCPU).contiguous();
    write_all(file.fd, packed.const_data_ptr(), packed.nbytes(), path);
  }
  SARISSA_CHECK(::fsync(file.fd) == 0, "cannot flush ", path.string(), ": ", std::strerror(errno));
}

}  // namespace sarissa::checkpoint
