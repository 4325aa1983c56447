// Runs calls of the C ABI that come from another process: so a library for another processor can be tested with the
// Python tests of this one. See foreign_library.py.
//
//   foreign_driver liblongscan.so [threads]
//
// A request on standard input, all integers 64 bits wide: the numbers of bytes of the name, of arguments, of blocks and
// of pointers, and the kind of the result; the name; the arguments; the size of every block and its bytes; for
// each pointer the block it is in (-1: the arguments), where (in bytes), the block it points to, and where. The answer:
// the result (of a text its size and its bytes), and each block, preceded by 1, or 0 if it did not change.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <thread>
#include <vector>

#define LS_SIX int64_t, int64_t, int64_t, int64_t, int64_t, int64_t

namespace {

constexpr int64_t MARGIN = 64, UNTOUCHED = 0xa5;  // around every block: nobody may write there
constexpr int64_t MOST_ARGUMENTS = 6;
enum { INTEGER = 0, DOUBLE = 1, TEXT = 2 };  // kinds of results
int64_t n_threads = 1;

void fail(const char *why, const char *what) {
  fprintf(stderr, "foreign_driver: %s: %s\n", why, what);
  exit(1);
}
void get(void *to, size_t n) {
  if (n && fread(to, 1, n, stdin) != n) fail("standard input ended", "within a request");
}
void put(const void *from, size_t n) {
  if (n && fwrite(from, 1, n, stdout) != n) fail("standard output", "could not be written");
}

struct Block {
  int64_t size = 0;
  char *data = nullptr;
  std::vector<char> before;

  void allocate(int64_t n) {
    size = n;
    const size_t all = (size_t)((n + 2 * MARGIN + 63) / 64 * 64);
    char *memory = (char *)aligned_alloc(64, all);
    memset(memory, UNTOUCHED, all);
    data = memory + MARGIN;
  }
  bool intact() const {
    for (int64_t i = 0; i < MARGIN; ++i)
      if ((uint8_t)data[i - MARGIN] != UNTOUCHED || (uint8_t)data[size + i] != UNTOUCHED) return false;
    return true;
  }
};

// What torch_parallel_for does, with threads that end.
int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*task)(int64_t, int64_t, void *), void *context) {
  const int64_t n = end - begin, used = n < n_threads ? n : n_threads;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < used; ++i)
    threads.emplace_back([=] { task(begin + n * i / used, begin + n * (i + 1) / used, context); });
  for (std::thread &thread : threads) thread.join();
  return 0;
}

void answer(void *library, const int64_t *sizes) {
  std::vector<char> name((size_t)sizes[0] + 1);
  get(name.data(), (size_t)sizes[0]);
  int64_t arguments[MOST_ARGUMENTS] = {};
  if (sizes[1] > MOST_ARGUMENTS) fail("too many arguments", name.data());
  get(arguments, 8 * (size_t)sizes[1]);
  std::vector<Block> blocks((size_t)sizes[2]);
  for (Block &block : blocks) {
    int64_t n;
    get(&n, 8);
    block.allocate(n);
    get(block.data, (size_t)n);
  }
  for (int64_t i = 0; i < sizes[3]; ++i) {
    int64_t at[4];
    get(at, sizeof at);
    const char *target = blocks[(size_t)at[2]].data + at[3];
    char *holder = at[0] < 0 ? (char *)arguments : blocks[(size_t)at[0]].data;
    memcpy(holder + at[1], &target, sizeof target);
  }
  for (Block &block : blocks) block.before.assign(block.data, block.data + block.size);

  void *function = dlsym(library, name.data());
  if (!function) fail("no such function", name.data());
  const int64_t *a = arguments;
  int64_t result;
  if (sizes[4] == DOUBLE) {
    const double value = ((double (*)(LS_SIX))function)(a[0], a[1], a[2], a[3], a[4], a[5]);
    memcpy(&result, &value, sizeof result);
  } else {
    result = ((int64_t(*)(LS_SIX))function)(a[0], a[1], a[2], a[3], a[4], a[5]);
  }
  const char *text = sizes[4] == TEXT ? (const char *)result : nullptr;
  if (text) result = (int64_t)strlen(text);
  put(&result, sizeof result);
  if (text) put(text, (size_t)result);
  for (Block &block : blocks) {
    if (!block.intact()) fail("wrote beside a buffer", name.data());
    const int64_t changed = memcmp(block.before.data(), block.data, (size_t)block.size) != 0;
    put(&changed, sizeof changed);
    if (changed) put(block.data, (size_t)block.size);
    free(block.data - MARGIN);
  }
  fflush(stdout);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 2) fail("expected", "foreign_driver liblongscan.so [threads]");
  void *library = dlopen(argv[1], RTLD_NOW);
  if (!library) fail("does not load", dlerror());
  if (argc > 2) n_threads = atoll(argv[2]);
  void *set_pool = dlsym(library, "ls_set_parallel_for");
  if (!set_pool) fail("no such function", "ls_set_parallel_for");
  if (n_threads > 1) ((void (*)(decltype(&parallel_for)))set_pool)(parallel_for);
  int64_t sizes[5];
  while (fread(sizes, 1, sizeof sizes, stdin) == sizeof sizes) answer(library, sizes);
  return 0;
}
