// What thrower.cpp exports.
extern "C" {
__attribute__((visibility("default"))) void throws();
__attribute__((visibility("default"))) int catches(void (*call)());
}
