/* Functions that runtimes before LLVM 15 have under other names. */
#include <string.h>
#define OLD __attribute__((weak)) void *
OLD __tsan_memcpy(void *to, const void *from, size_t n) { return memcpy(to, from, n); }
OLD __tsan_memmove(void *to, const void *from, size_t n) { return memmove(to, from, n); }
OLD __tsan_memset(void *to, int byte, size_t n) { return memset(to, byte, n); }
