// The few calls that Go needs of ONNX Runtime, each a sequence of calls of its C API, so that one inference crosses from Go
// to C three times and no Go pointer outlives a call. Every function that can fail returns a status, NULL for success, to
// be read and released by rx_error.
#ifndef RXVISION_ORT_H
#define RXVISION_ORT_H

#include <stddef.h>
#include <stdint.h>

#define RX_MAX_RANK 32

typedef struct {
	const char *name; // owned by the session's ports
	int32_t kind;     // ONNXType
	int32_t type;     // ONNXTensorElementDataType
	int64_t rank;     // -1 when the model does not say
	int64_t shape[RX_MAX_RANK];
} rx_port;

typedef struct {
	const char *name;
	int32_t type;
	int32_t rank;
	int64_t shape[RX_MAX_RANK];
	void *data;  // elements; strings: length-prefixed on the way in, NULL on the way out
	size_t size; // bytes of data; strings on the way out: of all their characters
	size_t count;
	void *value;
} rx_tensor;

char *rx_load(const char *path, const char **version);
char *rx_error(void *status, int *code);

void *rx_open(const char *path, int threads, void **session);
void rx_close(void *session);
void *rx_ports(void *session, int outputs, rx_port **ports, size_t *count);
void rx_free_ports(rx_port *ports, size_t count);
void *rx_metadata(void *session, char ***pairs, size_t *count);
void rx_free_metadata(char **pairs, size_t count);

void *rx_run_options(void **options);
void rx_terminate(void *options);
void rx_free_run_options(void *options);
void *rx_run(void *session, void *options, rx_tensor *in, size_t n_in, rx_tensor *out, size_t n_out);
void *rx_strings(rx_tensor *t, char *dst);
void rx_free_values(rx_tensor *t, size_t n);

int rx_telemetry_off(void);

#endif
