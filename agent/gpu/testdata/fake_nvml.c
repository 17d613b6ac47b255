/*
 * A stand-in for libnvidia-ml.so.1 that drives the real binding in tests.
 *
 * The environment variable RX_FAKE_NVML names a file of lines "KEY VALUE", read anew at each call:
 *   count 2 | driver 550.54 | cuda 12040
 *   N.uuid, N.name, N.mem, …          what GPU N answers (missing: NOT_SUPPORTED)
 *   N.mig.M.uuid, …                   its MIG device M
 *   N.lost 1                          every question to GPU N answers GPU_IS_LOST
 *   topology.N.M LEVEL                nvmlGpuTopologyLevel_t of two GPUs
 *   N.nvlink.L BUSID                  what is at the other end of an NVLink: a GPU's bus ID, or switch
 *   fail.SYMBOL CODE                  that function answers CODE
 *   event GPU TYPE DATA GI CI         delivered once per event set, in order
 *
 * -DMINIMAL leaves out all but what identifies a GPU, like a very old library; -DEMPTY is no NVML at all.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int ret_t;
typedef void *dev_t_;
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, SMALL = 7, TIMEOUT = 10, LOST = 15 };

#ifdef EMPTY
int something_else(void) { return 0; }
#else

static int lookup(const char *key, char *value, size_t size) {
	const char *path = getenv("RX_FAKE_NVML");
	FILE *f = path ? fopen(path, "r") : NULL;
	char line[512];
	size_t n = strlen(key);
	int found = 0;
	while (f && !found && fgets(line, sizeof line, f)) {
		line[strcspn(line, "\n")] = 0;
		if (strncmp(line, key, n) == 0 && line[n] == ' ') {
			snprintf(value, size, "%s", line + n + 1);
			found = 1;
		}
	}
	if (f) fclose(f);
	return found;
}

static int number(const char *key, unsigned long long *v) {
	char s[512];
	if (!lookup(key, s, sizeof s)) return 0;
	*v = strtoull(s, NULL, 10);
	return 1;
}

/* A handle is 1 + GPU number, plus 1000 for each MIG device before and including this one. */
static dev_t_ handle(int gpu, int mig) { return (dev_t_)(size_t)(1 + gpu + 1000 * (mig + 1)); }
static int gpu_of(dev_t_ d) { return (int)(((size_t)d - 1) % 1000); }
static int mig_of(dev_t_ d) { return (int)(((size_t)d - 1) / 1000) - 1; }

static const char *key_of(dev_t_ d, const char *what) {
	static __thread char key[128];
	if (mig_of(d) >= 0) snprintf(key, sizeof key, "%d.mig.%d.%s", gpu_of(d), mig_of(d), what);
	else snprintf(key, sizeof key, "%d.%s", gpu_of(d), what);
	return key;
}

static ret_t fails(const char *symbol) {
	char key[128];
	unsigned long long v;
	snprintf(key, sizeof key, "fail.%s", symbol);
	return number(key, &v) ? (ret_t)v : OK;
}

static ret_t trouble(dev_t_ d, const char *symbol) {
	char key[64];
	unsigned long long v;
	snprintf(key, sizeof key, "%d.lost", gpu_of(d));
	if (number(key, &v) && v) return LOST;
	return fails(symbol);
}

static ret_t text(dev_t_ d, const char *what, char *out, unsigned size, const char *symbol) {
	ret_t r = trouble(d, symbol);
	if (r) return r;
	char s[512];
	if (!lookup(key_of(d, what), s, sizeof s)) return NOT_SUPPORTED;
	if (strlen(s) >= size) return SMALL;
	strcpy(out, s);
	return OK;
}

static ret_t amount(dev_t_ d, const char *what, unsigned long long *out, const char *symbol) {
	ret_t r = trouble(d, symbol);
	if (r) return r;
	return number(key_of(d, what), out) ? OK : NOT_SUPPORTED;
}

#define AMOUNT(symbol, what, type) \
	ret_t symbol(dev_t_ d, type *out) { \
		unsigned long long v; \
		ret_t r = amount(d, what, &v, #symbol); \
		if (r == OK) *out = (type)v; \
		return r; \
	}

ret_t nvmlInit_v2(void) { return fails("nvmlInit_v2"); }
ret_t nvmlShutdown(void) { return fails("nvmlShutdown"); }

ret_t nvmlDeviceGetCount_v2(unsigned *count) {
	unsigned long long v = 0;
	ret_t r = fails("nvmlDeviceGetCount_v2");
	number("count", &v);
	*count = (unsigned)v;
	return r;
}

ret_t nvmlDeviceGetHandleByIndex_v2(unsigned i, dev_t_ *d) {
	*d = handle((int)i, -1);
	return fails("nvmlDeviceGetHandleByIndex_v2");
}

ret_t nvmlDeviceGetUUID(dev_t_ d, char *s, unsigned n) { return text(d, "uuid", s, n, "nvmlDeviceGetUUID"); }
ret_t nvmlDeviceGetName(dev_t_ d, char *s, unsigned n) { return text(d, "name", s, n, "nvmlDeviceGetName"); }

#ifndef MINIMAL
const char *nvmlErrorString(ret_t r) { return r ? "some error" : "success"; }

ret_t nvmlSystemGetDriverVersion(char *s, unsigned n) {
	char v[512];
	if (!lookup("driver", v, sizeof v)) return NOT_SUPPORTED;
	snprintf(s, n, "%s", v);
	return OK;
}

ret_t nvmlSystemGetCudaDriverVersion(int *v) {
	unsigned long long n;
	if (!number("cuda", &n)) return NOT_SUPPORTED;
	*v = (int)n;
	return OK;
}

typedef struct { unsigned long long total, free, used; } memory_t;

ret_t nvmlDeviceGetMemoryInfo(dev_t_ d, memory_t *m) {
	ret_t r = amount(d, "mem", &m->total, "nvmlDeviceGetMemoryInfo");
	if (r) return r;
	m->used = 0;
	number(key_of(d, "used"), &m->used);
	m->total <<= 20, m->used <<= 20;
	m->free = m->total - m->used;
	return OK;
}

ret_t nvmlDeviceGetBAR1MemoryInfo(dev_t_ d, memory_t *m) {
	ret_t r = amount(d, "bar1", &m->total, "nvmlDeviceGetBAR1MemoryInfo");
	m->total <<= 20;
	m->used = 1 << 20;
	m->free = m->total - m->used;
	return r;
}

typedef struct { char legacy[16]; unsigned domain, bus, device, id, sub; char bus_id[32]; } pci_t;

ret_t nvmlDeviceGetPciInfo_v3(dev_t_ d, pci_t *p) { return text(d, "pci", p->bus_id, sizeof p->bus_id, "nvmlDeviceGetPciInfo_v3"); }

AMOUNT(nvmlDeviceGetMinorNumber, "minor", unsigned)
AMOUNT(nvmlDeviceGetPowerManagementLimit, "limit", unsigned)
AMOUNT(nvmlDeviceGetPowerUsage, "power", unsigned)
AMOUNT(nvmlDeviceGetMaxPcieLinkGeneration, "gen", unsigned)
AMOUNT(nvmlDeviceGetMaxPcieLinkWidth, "width", unsigned)
AMOUNT(nvmlDeviceGetDisplayMode, "display", int)
AMOUNT(nvmlDeviceGetPersistenceMode, "persistence", int)
AMOUNT(nvmlDeviceGetMaxMigDeviceCount, "migmax", unsigned)
AMOUNT(nvmlDeviceGetGpuInstanceId, "gi", unsigned)
AMOUNT(nvmlDeviceGetComputeInstanceId, "ci", unsigned)
AMOUNT(nvmlDeviceGetSupportedEventTypes, "events", unsigned long long)

ret_t nvmlDeviceGetMaxClockInfo(dev_t_ d, int kind, unsigned *out) {
	unsigned long long v;
	ret_t r = amount(d, kind == 2 ? "memclock" : "clock", &v, "nvmlDeviceGetMaxClockInfo");
	*out = (unsigned)v;
	return r;
}

ret_t nvmlDeviceGetCudaComputeCapability(dev_t_ d, int *major, int *minor) {
	unsigned long long v;
	ret_t r = amount(d, "capability", &v, "nvmlDeviceGetCudaComputeCapability");
	*major = (int)v / 10, *minor = (int)v % 10;
	return r;
}

static ret_t pair(dev_t_ d, const char *what, unsigned *now, unsigned *next, const char *symbol) {
	unsigned long long v;
	ret_t r = amount(d, what, &v, symbol);
	*now = *next = (unsigned)v;
	return r;
}

ret_t nvmlDeviceGetEccMode(dev_t_ d, unsigned *now, unsigned *next) { return pair(d, "ecc", now, next, "nvmlDeviceGetEccMode"); }
ret_t nvmlDeviceGetMigMode(dev_t_ d, unsigned *now, unsigned *next) { return pair(d, "mig", now, next, "nvmlDeviceGetMigMode"); }
ret_t nvmlDeviceGetEncoderUtilization(dev_t_ d, unsigned *v, unsigned *us) { return pair(d, "encoder", v, us, "nvmlDeviceGetEncoderUtilization"); }
ret_t nvmlDeviceGetDecoderUtilization(dev_t_ d, unsigned *v, unsigned *us) { return pair(d, "decoder", v, us, "nvmlDeviceGetDecoderUtilization"); }

ret_t nvmlDeviceGetMigDeviceHandleByIndex(dev_t_ d, unsigned i, dev_t_ *out) {
	char s[512];
	*out = handle(gpu_of(d), (int)i);
	ret_t r = trouble(d, "nvmlDeviceGetMigDeviceHandleByIndex");
	if (r) return r;
	return lookup(key_of(*out, "uuid"), s, sizeof s) ? OK : NOT_FOUND;
}

typedef struct { unsigned sm, copy, dec, enc, jpeg, ofa, gpu_slices, compute_slices; unsigned long long mib; } attributes_t;

ret_t nvmlDeviceGetAttributes_v2(dev_t_ d, attributes_t *a) {
	unsigned long long v = 0;
	memset(a, 0, sizeof *a);
	ret_t r = amount(d, "mem", &a->mib, "nvmlDeviceGetAttributes_v2");
	if (number(key_of(d, "gslices"), &v)) a->gpu_slices = (unsigned)v;
	if (number(key_of(d, "cslices"), &v)) a->compute_slices = (unsigned)v;
	return r;
}

ret_t nvmlDeviceGetUtilizationRates(dev_t_ d, unsigned u[2]) {
	unsigned long long v;
	ret_t r = amount(d, "gpu%", &v, "nvmlDeviceGetUtilizationRates");
	u[0] = (unsigned)v;
	if (!r) r = amount(d, "mem%", &v, "nvmlDeviceGetUtilizationRates");
	u[1] = (unsigned)v;
	return r;
}

#ifdef NEW
ret_t nvmlDeviceGetTemperatureV(dev_t_ d, unsigned t[3]) { /* version, sensor, temperature */
	unsigned long long v;
	if (t[1] != 0) return INVALID;
	ret_t r = amount(d, "temp", &v, "nvmlDeviceGetTemperatureV");
	t[2] = (unsigned)v;
	return r;
}
#else
ret_t nvmlDeviceGetTemperature(dev_t_ d, int sensor, unsigned *out) {
	unsigned long long v;
	if (sensor != 0) return INVALID;
	ret_t r = amount(d, "temp", &v, "nvmlDeviceGetTemperature");
	*out = (unsigned)v;
	return r;
}
#endif

ret_t nvmlDeviceGetMemoryErrorCounter(dev_t_ d, int kind, int counter, int where, unsigned long long *out) {
	char what[32];
	if (counter != 0) return INVALID;
	snprintf(what, sizeof what, "ecc.%d.%d", kind, where);
	return amount(d, what, out, "nvmlDeviceGetMemoryErrorCounter");
}

ret_t nvmlDeviceGetTotalEccErrors(dev_t_ d, int kind, int counter, unsigned long long *out) {
	char what[32];
	if (counter != 0) return INVALID;
	snprintf(what, sizeof what, "ecc.%d.total", kind);
	return amount(d, what, out, "nvmlDeviceGetTotalEccErrors");
}

ret_t nvmlDeviceGetRemappedRows(dev_t_ d, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
	unsigned long long p = 0, f = 0;
	ret_t r = trouble(d, "nvmlDeviceGetRemappedRows");
	number(key_of(d, "remap.pending"), &p);
	number(key_of(d, "remap.failed"), &f);
	*corrected = *uncorrected = 0, *pending = (unsigned)p, *failed = (unsigned)f;
	return r;
}

AMOUNT(nvmlDeviceGetRetiredPagesPendingStatus, "pages.pending", unsigned)

typedef struct { unsigned id, scope; long long time, latency; unsigned type, ret; unsigned long long value; } field_t;

ret_t nvmlDeviceGetFieldValues(dev_t_ d, int n, field_t *f) {
	for (int i = 0; i < n; i++) {
		unsigned long long v = 0;
		f[i].ret = f[i].id == 230 ? (unsigned)amount(d, "recovery", &v, "nvmlDeviceGetFieldValues") : NOT_SUPPORTED;
		f[i].value = v;
	}
	return trouble(d, "nvmlDeviceGetFieldValues");
}

ret_t nvmlDeviceGetTopologyCommonAncestor(dev_t_ a, dev_t_ b, unsigned *level) {
	char key[64];
	unsigned long long v;
	snprintf(key, sizeof key, "topology.%d.%d", gpu_of(a), gpu_of(b));
	if (!number(key, &v)) return NOT_SUPPORTED;
	*level = (unsigned)v;
	return trouble(a, "nvmlDeviceGetTopologyCommonAncestor");
}

static int nvlink(dev_t_ d, unsigned link, char *end, size_t size) {
	char key[64];
	snprintf(key, sizeof key, "%d.nvlink.%u", gpu_of(d), link);
	return lookup(key, end, size);
}

ret_t nvmlDeviceGetNvLinkState(dev_t_ d, unsigned link, unsigned *up) {
	char end[64];
	*up = 1;
	return nvlink(d, link, end, sizeof end) ? OK : INVALID;
}

ret_t nvmlDeviceGetNvLinkRemoteDeviceType(dev_t_ d, unsigned link, unsigned *kind) {
	char end[64];
	if (!nvlink(d, link, end, sizeof end)) return INVALID;
	*kind = strcmp(end, "switch") == 0 ? 2 : 0;
	return OK;
}

ret_t nvmlDeviceGetNvLinkRemotePciInfo_v2(dev_t_ d, unsigned link, pci_t *p) {
	return nvlink(d, link, p->bus_id, sizeof p->bus_id) ? OK : INVALID;
}

typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } process_t;

/* N.processes 3: pids 101, 102, 103 with 1, 2, 3 MiB; the last one hides its memory. */
ret_t nvmlDeviceGetComputeRunningProcesses_v3(dev_t_ d, unsigned *count, process_t *out) {
	unsigned long long have = 0;
	ret_t r = amount(d, "processes", &have, "nvmlDeviceGetComputeRunningProcesses_v3");
	if (r) return r;
	unsigned room = *count;
	*count = (unsigned)have;
	if (room < have) return SMALL;
	for (unsigned i = 0; i < have; i++) {
		process_t p = { 101 + i, (i + 1ULL) << 20, 0xFFFFFFFF, 0xFFFFFFFF };
		if (i + 1 == have) p.used = ~0ULL;
		out[i] = p;
	}
	return OK;
}

typedef struct { int seen; unsigned long long want[64]; } set_t;
typedef struct { dev_t_ device; unsigned long long type, data; unsigned gi, ci; } event_t;

ret_t nvmlEventSetCreate(set_t **set) {
	*set = calloc(1, sizeof **set);
	return fails("nvmlEventSetCreate");
}

ret_t nvmlEventSetFree(set_t *set) { free(set); return OK; }

ret_t nvmlDeviceRegisterEvents(dev_t_ d, unsigned long long types, set_t *set) {
	ret_t r = trouble(d, "nvmlDeviceRegisterEvents");
	if (!r) set->want[gpu_of(d)] |= types;
	return r;
}

static int next_event(set_t *set, event_t *e) {
	const char *path = getenv("RX_FAKE_NVML");
	FILE *f = path ? fopen(path, "r") : NULL;
	char line[512];
	int gpu, n = 0, found = 0;
	while (f && !found && fgets(line, sizeof line, f)) {
		if (sscanf(line, "event %d %llu %llu %u %u", &gpu, &e->type, &e->data, &e->gi, &e->ci) != 5) continue;
		if (n++ < set->seen) continue;
		set->seen++;
		e->device = handle(gpu, -1);
		found = (set->want[gpu] & e->type) != 0;
	}
	if (f) fclose(f);
	return found;
}

ret_t nvmlEventSetWait_v2(set_t *set, event_t *e, unsigned ms) {
	ret_t r = fails("nvmlEventSetWait_v2");
	if (r) return r;
	struct timespec pause = { 0, 1000000 };
	for (unsigned i = 0; i < ms; i++) {
		if (next_event(set, e)) return OK;
		nanosleep(&pause, NULL);
	}
	return next_event(set, e) ? OK : TIMEOUT;
}
#endif
#endif
