package oip

import (
	"fmt"
	"net/http"
)

// HeaderLength is the HTTP header that gives the length of the JSON part of a body that carries binary tensors.
const HeaderLength = "Inference-Header-Content-Length"

// HeaderQueueTime is the HTTP header by which a worker says how long a request waited for its turn, in microseconds.
const HeaderQueueTime = "Rxvision-Queue-Time-Us"

// Error is an answer that is not a success: what a server says in {"error": …} with a status, and what decoding a bad
// message reports (then with status 400). The message is one sentence.
type Error struct {
	Status  int
	Message string
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error.
func Errorf(status int, format string, args ...any) *Error {
	return &Error{Status: status, Message: fmt.Sprintf(format, args...)}
}

func badf(format string, args ...any) *Error { return Errorf(http.StatusBadRequest, format, args...) }

// Request is one inference request.
type Request struct {
	ID         string
	Parameters map[string]any // string, bool, int64 or float64; without those that the binary extension defines
	Inputs     []Tensor
	Outputs    []Output // the wanted outputs, in order; empty asks for all
	// BinaryOutput asks for binary outputs wherever an Output does not say otherwise ("binary_data_output").
	BinaryOutput bool
}

// Output names an output that a request wants, and whether it wants it as binary data.
type Output struct {
	Name   string
	Binary bool
}

// Binary says whether the request wants the named output as binary data.
func (r *Request) Binary(output string) bool {
	for _, o := range r.Outputs {
		if o.Name == output {
			return o.Binary
		}
	}
	return r.BinaryOutput
}

// Response is the answer to a Request.
type Response struct {
	ModelName    string
	ModelVersion string
	ID           string
	Parameters   map[string]any
	Outputs      []Tensor
}

// TensorMetadata describes an input or output of a model; a dimension that may vary is -1.
type TensorMetadata struct {
	Name     string   `json:"name"`
	Datatype Datatype `json:"datatype"`
	Shape    []int64  `json:"shape"`
}

// ModelMetadata is the answer to GET /v2/models/{model}.
type ModelMetadata struct {
	Name     string           `json:"name"`
	Versions []string         `json:"versions,omitempty"`
	Platform string           `json:"platform"` // "onnxruntime_onnx"
	Inputs   []TensorMetadata `json:"inputs"`
	Outputs  []TensorMetadata `json:"outputs"`
	// Properties are the custom metadata of the model file, an addition of ours to the protocol.
	Properties map[string]string `json:"properties,omitempty"`
}

// ServerMetadata is the answer to GET /v2.
type ServerMetadata struct {
	Name       string   `json:"name"`
	Version    string   `json:"version"`
	Extensions []string `json:"extensions"`
}

// LiveResponse is the answer to GET /v2/health/live.
type LiveResponse struct {
	Live bool `json:"live"`
}

// ReadyResponse is the answer to GET /v2/health/ready and, with a name, to GET /v2/models/{model}/ready.
type ReadyResponse struct {
	Name  string `json:"name,omitempty"`
	Ready bool   `json:"ready"`
}

// ErrorResponse is the body of every answer that is not a success.
type ErrorResponse struct {
	Error string `json:"error"`
}
