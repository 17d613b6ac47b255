package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/rxvision/rxvision/oip"
)

// retryAfter is what a refused client is told to wait, in seconds.
const retryAfter = "1"

// routes are all that a worker answers.
func (w *worker) routes(reg *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	get := func(pattern string, h func(r *http.Request) (any, error)) {
		mux.Handle(pattern, w.only(http.MethodGet, func(rw http.ResponseWriter, r *http.Request) error {
			answer, err := h(r)
			if err == nil {
				writeJSON(rw, http.StatusOK, answer)
			}
			return err
		}))
	}
	get("/v2", w.server)
	get("/v2/{$}", w.server)
	get("/v2/health/live", func(*http.Request) (any, error) { return oip.LiveResponse{Live: true}, nil })
	mux.Handle("/v2/health/ready", w.only(http.MethodGet, w.ready))
	for _, prefix := range []string{"/v2/models/{model}", "/v2/models/{model}/versions/{version}"} {
		get(prefix, func(r *http.Request) (any, error) {
			m, err := w.find(r)
			if err != nil {
				return nil, err
			}
			return m.metadata, nil
		})
		mux.Handle(prefix+"/ready", w.only(http.MethodGet, w.ready))
		mux.Handle(prefix+"/infer", w.only(http.MethodPost, w.infer))
	}
	metrics := promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
	mux.Handle("/metrics", w.only(http.MethodGet, func(rw http.ResponseWriter, r *http.Request) error {
		metrics.ServeHTTP(rw, r)
		return nil
	}))
	mux.Handle("/", w.only("", func(_ http.ResponseWriter, r *http.Request) error {
		return oip.Errorf(http.StatusNotFound, "no such path: %s", clip(r.URL.Path))
	}))
	return mux
}

// only lets one method through, and writes the errors of its handler.
func (w *worker) only(method string, h func(http.ResponseWriter, *http.Request) error) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if w.draining.Load() {
			rw.Header().Set("Connection", "close") // the next request shall find another worker
		}
		err := error(nil)
		switch {
		case method == "" || r.Method == method || r.Method == http.MethodHead && method == http.MethodGet:
			err = h(rw, r)
		default:
			rw.Header().Set("Allow", method)
			err = oip.Errorf(http.StatusMethodNotAllowed, "%s: expected method %s, got %s", clip(r.URL.Path), method, clip(r.Method))
		}
		if err != nil {
			w.fail(rw, r, err)
		}
	})
}

// fail answers with an error.
func (w *worker) fail(rw http.ResponseWriter, r *http.Request, err error) {
	status := oip.StatusOf(err)
	switch {
	case r.Context().Err() != nil && status == 0:
		status = http.StatusServiceUnavailable // nobody reads it
	case status == 0:
		status = http.StatusInternalServerError
		w.log.Error("request failed", "path", r.URL.Path, "error", err)
	}
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		rw.Header().Set("Retry-After", retryAfter)
	}
	writeJSON(rw, status, oip.ErrorResponse{Error: err.Error()})
}

func writeJSON(rw http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		status, body = http.StatusInternalServerError, []byte(`{"error":"the answer cannot be encoded"}`)
	}
	rw.Header().Set("Content-Type", "application/json")
	rw.Header().Set("Content-Length", strconv.Itoa(len(body)))
	rw.WriteHeader(status)
	_, _ = rw.Write(body) // a client that went away is no fault of ours
}

func clip(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

func (w *worker) server(*http.Request) (any, error) {
	return oip.ServerMetadata{Name: "rxvision worker", Version: w.config.Release, Extensions: []string{"binary_tensor_data"}}, nil
}

// ready answers for the server, or for a model when the path has one.
func (w *worker) ready(rw http.ResponseWriter, r *http.Request) error {
	if r.PathValue("model") != "" {
		if err := w.named(r); err != nil {
			return err
		}
	}
	state := struct {
		oip.ReadyResponse
		Error string `json:"error,omitempty"`
	}{ReadyResponse: oip.ReadyResponse{Name: r.PathValue("model"), Ready: true}}
	status := http.StatusOK
	if w.draining.Load() {
		state.Error = "the worker is stopping"
	} else if w.model.Load() == nil {
		state.Error = "the model is still loading"
	}
	if state.Error != "" {
		state.Ready, status = false, http.StatusServiceUnavailable
		rw.Header().Set("Retry-After", retryAfter)
	}
	writeJSON(rw, status, state)
	return nil
}

// named says whether the path names the model that is served here.
func (w *worker) named(r *http.Request) error {
	c := &w.config
	if name := r.PathValue("model"); name != c.Model {
		return oip.Errorf(http.StatusNotFound, "no model %q here: this worker serves %q", clip(name), c.Model)
	}
	if v := r.PathValue("version"); v != "" && v != c.Version {
		return oip.Errorf(http.StatusNotFound, "no version %q of model %q here: this worker serves version %q",
			clip(v), c.Model, c.Version)
	}
	return nil
}

// find gives the model that the path names.
func (w *worker) find(r *http.Request) (*model, error) {
	if err := w.named(r); err != nil {
		return nil, err
	}
	m := w.model.Load()
	if m == nil {
		return nil, oip.Errorf(http.StatusServiceUnavailable, "model %q is still loading", w.config.Model)
	}
	return m, nil
}

// infer answers one inference request.
func (w *worker) infer(rw http.ResponseWriter, r *http.Request) error {
	m, err := w.find(r)
	if err != nil {
		return err
	}
	n, t, err := w.run(rw, r, m)
	if err != nil {
		w.metrics.failed(err)
		return err
	}
	w.metrics.succeeded(n, t)
	return nil
}

// run reads, runs and answers an inference request of n inferences.
func (w *worker) run(rw http.ResponseWriter, r *http.Request, m *model) (n int64, t timings, err error) {
	start := time.Now()
	headerLen, err := oip.ParseHeaderLength(r.Header)
	if err != nil {
		return 0, t, err
	}
	if e := r.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return 0, t, oip.Errorf(http.StatusUnsupportedMediaType, "Content-Encoding: expected none, got %q", clip(e))
	}
	held := r.ContentLength
	if held < 0 {
		held = w.config.MaxBody // chunked: it may become as large as that
	}
	if held > w.config.MaxBody {
		return 0, t, w.tooLarge()
	}
	if !w.bodies.take(held) {
		return 0, t, errNoMemory
	}
	defer w.bodies.release(held)

	// The inputs alias this buffer: it goes back only when nothing uses them any more.
	buffer := buffers.Get().(*[]byte)
	defer giveBack(buffer)
	if err := w.readBody(rw, r, buffer); err != nil {
		return 0, t, err
	}
	request, err := oip.DecodeRequest(*buffer, headerLen)
	if err != nil {
		return 0, t, err
	}
	var outputs []string
	for _, o := range request.Outputs {
		outputs = append(outputs, o.Name)
	}
	decoded := time.Now()
	result, t, err := m.executor.infer(r.Context(), request.Inputs, outputs)
	t.input = decoded.Sub(start)
	if err != nil {
		return 0, t, err
	}
	executed := time.Now()
	n = 1
	if m.batched {
		n = request.Inputs[0].Shape[0]
	}
	rw.Header().Set(oip.HeaderQueueTime, strconv.FormatInt(t.queue.Microseconds(), 10))
	err = w.answer(rw, request, &oip.Response{
		ModelName: w.config.Model, ModelVersion: w.config.Version, ID: request.ID, Outputs: result,
	})
	t.output = time.Since(executed)
	return n, t, err
}

func (w *worker) tooLarge() error {
	return oip.Errorf(http.StatusRequestEntityTooLarge, "the body is larger than %d bytes, the limit of this worker", w.config.MaxBody)
}

// answer encodes and writes a response.
func (w *worker) answer(rw http.ResponseWriter, request *oip.Request, response *oip.Response) error {
	buffer := buffers.Get().(*[]byte)
	defer giveBack(buffer)
	head, tail, err := response.Encode((*buffer)[:0], request)
	if err != nil {
		return err
	}
	*buffer = head
	h := rw.Header()
	h.Set("Content-Type", "application/json")
	total := len(head)
	if tail != nil {
		h.Set("Content-Type", "application/octet-stream")
		h.Set(oip.HeaderLength, strconv.Itoa(len(head)))
		for _, b := range tail {
			total += len(b)
		}
	}
	h.Set("Content-Length", strconv.Itoa(total))
	_ = http.NewResponseController(rw).SetWriteDeadline(time.Now().Add(writeTimeout))
	// Write errors mean that the client went away; the inference was done all the same.
	if _, err := rw.Write(head); err != nil {
		return nil
	}
	for _, b := range tail {
		if _, err := rw.Write(b); err != nil {
			return nil
		}
	}
	return nil
}

// maxPooled is the largest buffer that is kept for the next request.
const maxPooled = 16 << 20

var buffers = sync.Pool{New: func() any {
	b := make([]byte, 0, 64<<10)
	return &b
}}

func giveBack(b *[]byte) {
	if cap(*b) <= maxPooled {
		buffers.Put(b)
	}
}

// readBody reads the body into buffer, within the limits of size and time.
func (w *worker) readBody(rw http.ResponseWriter, r *http.Request, buffer *[]byte) error {
	control := http.NewResponseController(rw)
	_ = control.SetReadDeadline(time.Now().Add(bodyTimeout))
	body := http.MaxBytesReader(rw, r.Body, w.config.MaxBody)
	b := (*buffer)[:0]
	if n := int(r.ContentLength); n >= cap(b) {
		b = make([]byte, 0, n+1) // one more, so that the end is found without growing
	}
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := body.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			*buffer = b
			return w.bodyError(r.Context(), err, len(b))
		}
	}
	*buffer = b
	_ = control.SetReadDeadline(time.Time{}) // or it would end the run
	return nil
}

func (w *worker) bodyError(ctx context.Context, err error, got int) error {
	var tooLarge *http.MaxBytesError
	var timeout interface{ Timeout() bool }
	switch {
	case errors.As(err, &tooLarge):
		return w.tooLarge()
	case errors.As(err, &timeout) && timeout.Timeout():
		return oip.Errorf(http.StatusRequestTimeout, "the body did not come within %v: %d bytes did", bodyTimeout, got)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return oip.Errorf(http.StatusBadRequest, "the body ended early, after %d bytes: %s", got, fmt.Sprint(err))
}
