//go:build cgo

#include "ort.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "_cgo_export.h"

// ONNX Runtime hands out a table of functions that only ever grows at its end, so a position is as stable as a name.
// These are the positions, counted from 0 in struct OrtApi of onnxruntime_c_api.h, of what is used here; all of them are
// in every release since 1.17 but HasShape, which came with 1.24.
enum {
	GetErrorCode = 1,
	GetErrorMessage = 2,
	CreateEnvWithCustomLogger = 4,
	DisableTelemetryEvents = 6,
	CreateSession = 7,
	Run = 9,
	CreateSessionOptions = 10,
	SetIntraOpNumThreads = 24,
	SetInterOpNumThreads = 25,
	SessionGetInputCount = 30,
	SessionGetOutputCount = 31,
	SessionGetInputTypeInfo = 33,
	SessionGetOutputTypeInfo = 34,
	SessionGetInputName = 36,
	SessionGetOutputName = 37,
	CreateRunOptions = 39,
	RunOptionsSetTerminate = 46,
	CreateTensorAsOrtValue = 48,
	CreateTensorWithDataAsOrtValue = 49,
	IsTensor = 50,
	GetTensorMutableData = 51,
	GetStringTensorDataLength = 53,
	GetStringTensorContent = 54,
	CastTypeInfoToTensorInfo = 55,
	GetOnnxTypeFromTypeInfo = 56,
	GetTensorElementType = 60,
	GetDimensionsCount = 61,
	GetDimensions = 62,
	GetTensorShapeElementCount = 64,
	GetTensorTypeAndShape = 65,
	CreateCpuMemoryInfo = 69,
	AllocatorFree = 76,
	GetAllocatorWithDefaultOptions = 78,
	ReleaseMemoryInfo = 94,
	ReleaseStatus = 93,
	ReleaseSession = 95,
	ReleaseValue = 96,
	ReleaseRunOptions = 97,
	ReleaseTypeInfo = 98,
	ReleaseTensorTypeAndShapeInfo = 99,
	ReleaseSessionOptions = 100,
	SessionGetModelMetadata = 111,
	ModelMetadataLookupCustomMetadataMap = 116,
	ReleaseModelMetadata = 118,
	ModelMetadataGetCustomMetadataMapKeys = 123,
	AddSessionConfigEntry = 130,
	GetResizedStringTensorElementBuffer = 252,
	HasShape = 390,
};

enum { OLDEST = 17, NEWEST = 24, TENSOR = 1, SPARSE_TENSOR = 5, STRING = 8, ARENA_ALLOCATOR = 1, DEFAULT_MEMORY = 0, WARNING = 2 };

typedef struct {
	const void *(*api)(uint32_t version);
	const char *(*version)(void);
} api_base;

static void *const *api;
static unsigned api_version;
static void *env, *memory, *allocator;

// CALL calls a function that returns a status, with arguments of the right types: pointers, size_t, int64_t.
#define CALL(f, types, ...) ((void *(*) types)api[f])(__VA_ARGS__)
#define RELEASE(f, p) ((void (*)(void *))api[f])(p)
#define TRY(call) \
	do { \
		void *status_ = (call); \
		if (status_) return status_; \
	} while (0)
#define TRY_OR(label, call) \
	do { \
		if ((status = (call))) goto label; \
	} while (0)

typedef void (*logger)(void *, int, const char *, const char *, const char *, const char *);

static void log_line(void *param, int severity, const char *category, const char *id, const char *where, const char *message) {
	(void)param, (void)id, (void)where;
	rxLog(severity, (char *)category, (char *)message);
}

int rx_telemetry_off(void) {
	const char *v = getenv("ORT_DISABLE_TELEMETRY");
	return v && strcmp(v, "1") == 0;
}

// rx_load loads the library and makes the environment. It returns NULL, or a message to be freed.
char *rx_load(const char *path, const char **version) {
	if (!rx_telemetry_off()) return strdup("ORT_DISABLE_TELEMETRY is not set to 1");
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!handle) return strdup(dlerror());
	const api_base *(*get)(void) = (const api_base *(*)(void))dlsym(handle, "OrtGetApiBase");
	if (!get) {
		dlclose(handle);
		return strdup("it has no function OrtGetApiBase, so it is not ONNX Runtime");
	}
	const api_base *base = get();
	*version = base->version();
	unsigned minor = 0;
	if (sscanf(*version, "1.%u", &minor) != 1 || minor < OLDEST) {
		char text[128];
		snprintf(text, sizeof text, "ONNX Runtime %.32s is too old: 1.%d or newer is needed", *version, OLDEST);
		dlclose(handle);
		return strdup(text);
	}
	api_version = minor < NEWEST ? minor : NEWEST;
	api = base->api(api_version);
	if (!api) return strdup("it does not offer the C API that it should");
	void *status = CALL(CreateEnvWithCustomLogger, (logger, void *, int, const char *, void **),
		log_line, NULL, WARNING, "rxvision", &env);
	if (!status) status = CALL(DisableTelemetryEvents, (void *), env);
	if (!status) status = CALL(CreateCpuMemoryInfo, (int, int, void **), ARENA_ALLOCATOR, DEFAULT_MEMORY, &memory);
	if (!status) status = CALL(GetAllocatorWithDefaultOptions, (void **), &allocator);
	return status ? rx_error(status, NULL) : NULL;
}

// rx_error gives the message of a status, to be freed, and releases the status.
char *rx_error(void *status, int *code) {
	if (code) *code = ((int (*)(void *))api[GetErrorCode])(status);
	char *text = strdup(((const char *(*)(void *))api[GetErrorMessage])(status));
	RELEASE(ReleaseStatus, status);
	return text;
}

static void give_back(void *p) {
	void *status = p ? CALL(AllocatorFree, (void *, void *), allocator, p) : NULL;
	if (status) RELEASE(ReleaseStatus, status);
}

void *rx_open(const char *path, int threads, void **session) {
	void *options = NULL, *status = NULL;
	TRY(CALL(CreateSessionOptions, (void **), &options));
	TRY_OR(done, CALL(SetIntraOpNumThreads, (void *, int), options, threads));
	TRY_OR(done, CALL(SetInterOpNumThreads, (void *, int), options, 1));
	// Threads that spin while they wait for work take the cores from other runs.
	TRY_OR(done, CALL(AddSessionConfigEntry, (void *, const char *, const char *), options, "session.intra_op.allow_spinning", "0"));
	status = CALL(CreateSession, (void *, const char *, void *, void **), env, path, options, session);
done:
	RELEASE(ReleaseSessionOptions, options);
	return status;
}

void rx_close(void *session) { RELEASE(ReleaseSession, session); }

// read_shape reads type and shape out of a tensor's info.
static void *read_shape(const void *info, int32_t *type, int64_t *shape, size_t *rank) {
	int element = 0;
	TRY(CALL(GetTensorElementType, (const void *, int *), info, &element));
	*type = element;
	TRY(CALL(GetDimensionsCount, (const void *, size_t *), info, rank));
	if (*rank > 0 && *rank <= RX_MAX_RANK) TRY(CALL(GetDimensions, (const void *, int64_t *, size_t), info, shape, *rank));
	return NULL;
}

static void *read_port(void *session, int outputs, size_t i, rx_port *p) {
	void *type = NULL, *status = NULL;
	const void *info = NULL;
	char *name = NULL;
	size_t rank = 0;
	int kind = 0;
	TRY(CALL(outputs ? SessionGetOutputName : SessionGetInputName, (void *, size_t, void *, char **), session, i, allocator, &name));
	p->name = strdup(name);
	give_back(name);
	TRY(CALL(outputs ? SessionGetOutputTypeInfo : SessionGetInputTypeInfo, (void *, size_t, void **), session, i, &type));
	TRY_OR(done, CALL(GetOnnxTypeFromTypeInfo, (void *, int *), type, &kind));
	p->kind = kind;
	if (kind != TENSOR) goto done;
	TRY_OR(done, CALL(CastTypeInfoToTensorInfo, (void *, const void **), type, &info));
	TRY_OR(done, read_shape(info, &p->type, p->shape, &rank));
	p->rank = rank;
	// Without dimensions a tensor is a scalar or of any rank; only newer releases can tell which.
	if (rank == 0 && (api_version < 24 || !((_Bool (*)(const void *))api[HasShape])(info))) p->rank = -1;
done:
	RELEASE(ReleaseTypeInfo, type);
	return status;
}

void *rx_ports(void *session, int outputs, rx_port **ports, size_t *count) {
	TRY(CALL(outputs ? SessionGetOutputCount : SessionGetInputCount, (void *, size_t *), session, count));
	*ports = calloc(*count + 1, sizeof **ports);
	for (size_t i = 0; i < *count; i++) TRY(read_port(session, outputs, i, &(*ports)[i]));
	return NULL;
}

void rx_free_ports(rx_port *ports, size_t count) {
	for (size_t i = 0; ports && i < count; i++) free((char *)ports[i].name);
	free(ports);
}

// rx_metadata gives keys and values of the model's custom metadata, alternately.
void *rx_metadata(void *session, char ***pairs, size_t *count) {
	void *metadata = NULL, *status = NULL;
	char **keys = NULL;
	int64_t n = 0;
	TRY(CALL(SessionGetModelMetadata, (void *, void **), session, &metadata));
	TRY_OR(done, CALL(ModelMetadataGetCustomMetadataMapKeys, (void *, void *, char ***, int64_t *), metadata, allocator, &keys, &n));
	*pairs = calloc(2 * n + 1, sizeof **pairs);
	*count = 2 * n;
	for (int64_t i = 0; i < n; i++) {
		char *value = NULL;
		if (!status)
			status = CALL(ModelMetadataLookupCustomMetadataMap, (void *, void *, const char *, char **),
				metadata, allocator, keys[i], &value);
		(*pairs)[2 * i] = strdup(keys[i]);
		(*pairs)[2 * i + 1] = strdup(value ? value : "");
		give_back(keys[i]);
		give_back(value);
	}
	give_back(keys);
done:
	RELEASE(ReleaseModelMetadata, metadata);
	return status;
}

void rx_free_metadata(char **pairs, size_t count) {
	for (size_t i = 0; pairs && i < count; i++) free(pairs[i]);
	free(pairs);
}

void *rx_run_options(void **options) { return CALL(CreateRunOptions, (void **), options); }

// rx_terminate ends the run that uses these options, now or as soon as it starts.
void rx_terminate(void *options) {
	void *status = CALL(RunOptionsSetTerminate, (void *), options);
	if (status) RELEASE(ReleaseStatus, status);
}

void rx_free_run_options(void *options) { RELEASE(ReleaseRunOptions, options); }

// make_input makes the value of an input. Numbers stay where they are; strings, whose number and lengths the caller has
// checked, are copied.
static void *make_input(rx_tensor *t) {
	static char nothing[8];
	if (t->type != STRING)
		return CALL(CreateTensorWithDataAsOrtValue, (void *, void *, size_t, const int64_t *, size_t, int, void **),
			memory, t->size ? t->data : nothing, t->size, t->shape, t->rank, t->type, &t->value);
	TRY(CALL(CreateTensorAsOrtValue, (void *, const int64_t *, size_t, int, void **),
		allocator, t->shape, t->rank, t->type, &t->value));
	const char *p = t->data;
	for (size_t i = 0; i < t->count; i++) {
		uint32_t length;
		char *buffer;
		memcpy(&length, p, sizeof length);
		p += sizeof length;
		TRY(CALL(GetResizedStringTensorElementBuffer, (void *, size_t, size_t, char **), t->value, i, length, &buffer));
		memcpy(buffer, p, length);
		p += length;
	}
	return NULL;
}

// width is the bytes of an element, 0 for a type without a protocol name; the order is ONNXTensorElementDataType's.
static const unsigned char width[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 0, 0, 2};

// read_output fills t from its value.
static void *read_output(rx_tensor *t) {
	void *info = NULL, *status = NULL;
	size_t rank = 0;
	int is_tensor = 0;
	TRY(CALL(IsTensor, (void *, int *), t->value, &is_tensor));
	if (!is_tensor) return NULL; // type stays 0
	TRY(CALL(GetTensorTypeAndShape, (void *, void **), t->value, &info));
	TRY_OR(done, read_shape(info, &t->type, t->shape, &rank));
	t->rank = rank;
	TRY_OR(done, CALL(GetTensorShapeElementCount, (void *, size_t *), info, &t->count));
	if (t->type == STRING) {
		status = CALL(GetStringTensorDataLength, (void *, size_t *), t->value, &t->size);
	} else {
		t->size = t->count * (t->type < (int)sizeof width ? width[t->type] : 0);
		status = CALL(GetTensorMutableData, (void *, void **), t->value, &t->data);
	}
done:
	RELEASE(ReleaseTensorTypeAndShapeInfo, info);
	return status;
}

// rx_run runs the model. The values of in are released; those of out live until rx_free_values, also after an error.
void *rx_run(void *session, void *options, rx_tensor *in, size_t n_in, rx_tensor *out, size_t n_out) {
	void *status = NULL;
	size_t n = n_in + n_out + 1;
	const char **names = calloc(n, sizeof *names);
	void **values = calloc(n, sizeof *values);
	for (size_t i = 0; i < n_in; i++) {
		TRY_OR(done, make_input(&in[i]));
		names[i] = in[i].name;
		values[i] = in[i].value;
	}
	for (size_t i = 0; i < n_out; i++) names[n_in + i] = out[i].name;
	status = CALL(Run, (void *, void *, const char **, void **, size_t, const char **, size_t, void **),
		session, options, names, values, n_in, names + n_in, n_out, values + n_in);
	for (size_t i = 0; i < n_out; i++) out[i].value = values[n_in + i];
	for (size_t i = 0; !status && i < n_out; i++) status = read_output(&out[i]);
done:
	rx_free_values(in, n_in);
	free(names);
	free(values);
	return status;
}

// rx_strings writes the elements of a string tensor to dst, size + 4 * count bytes, each after its length.
void *rx_strings(rx_tensor *t, char *dst) {
	char *text = malloc(t->size + 1);
	size_t *offsets = calloc(t->count + 1, sizeof *offsets);
	void *status = CALL(GetStringTensorContent, (void *, void *, size_t, size_t *, size_t),
		t->value, text, t->size, offsets, t->count);
	offsets[t->count] = t->size;
	for (size_t i = 0; !status && i < t->count; i++) {
		uint32_t length = offsets[i + 1] - offsets[i];
		memcpy(dst, &length, sizeof length);
		memcpy(dst + sizeof length, text + offsets[i], length);
		dst += sizeof length + length;
	}
	free(text);
	free(offsets);
	return status;
}

void rx_free_values(rx_tensor *t, size_t n) {
	for (size_t i = 0; i < n; i++) {
		if (t[i].value) RELEASE(ReleaseValue, t[i].value);
		t[i].value = NULL;
	}
}
