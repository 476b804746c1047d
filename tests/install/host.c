/* Loads the plugin that is its argument, calls it and unloads it, again and again: nothing of the plugin's runs
 * afterwards, neither in a thread nor at a fork. Rust's standard library keeps it loaded until the thread that made
 * the call has ended. */
#define _DEFAULT_SOURCE 1
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int failed(const char *what) { return fprintf(stderr, "%s\n", what), 1; }

static double (*loss)(void);
static double value;

static void *call(void *unused) {
    value = loss();
    return unused;
}

static int once(const char *file) {
    pthread_t thread;
    void *plugin = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    void *symbol = plugin ? dlsym(plugin, "plugin_loss") : NULL;
    int status = 0;
    if (!symbol) return failed(dlerror());
    memcpy(&loss, &symbol, sizeof loss);
    if (pthread_create(&thread, NULL, call, NULL) || pthread_join(thread, NULL)) return failed("no thread");
    if (!(fabs(value - log(1000)) < 1e-6)) return failed("the plugin's loss is wrong");
    if (dlclose(plugin) != 0) return failed(dlerror());
    if (dlopen(file, RTLD_NOW | RTLD_NOLOAD)) return failed("the plugin is still there");
    pid_t child = fork();
    if (child == 0) _exit(0);
    if (waitpid(child, &status, 0) != child || status != 0) return failed("a fork fails");
    return 0;
}

int main(int count, char **arguments) {
    for (int k = 0; k < 12; k++)
        if (count != 2 || once(arguments[1])) return 1;
    return 0;
}
