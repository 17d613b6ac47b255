package api

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"reflect"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Bounds of requests.
const (
	// MaxBody bounds a JSON body, in bytes; a job comes with its source.
	MaxBody = 4 << 20
	// maxNesting and maxObjects bound what decoding a JSON body may allocate: an
	// object of two bytes can stand for a struct of hundreds.
	maxNesting = 128
	maxObjects = 20_000
	// bodyTimeout bounds reading a JSON body, and each step of a longer one.
	bodyTimeout = 30 * time.Second
	// minRate is the least pace of a longer body, in bytes per second.
	minRate = 4 << 10
	// writeTimeout bounds each write of an answer.
	writeTimeout = 30 * time.Second
	// minGzip is the size from which an answer is worth compressing, in bytes.
	minGzip = 512
)

// answer is what a handler returns when the body alone does not say it all.
type answer struct {
	status int // 0: 200
	body   any // nil: empty
	index  uint64
	// read adds the headers of reads: known leader and last contact.
	read bool
	next string // token of the next page
	err  error  // answered instead of body, with the headers
}

// streamFunc writes an answer by itself. An error before the first byte is
// answered as any error; later it can only end the connection.
type streamFunc func(w http.ResponseWriter) error

// null is a body of JSON null; a nil body is empty.
type null struct{}

// MarshalJSON implements json.Marshaler.
func (null) MarshalJSON() ([]byte, error) { return []byte("null"), nil }

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, hr *http.Request) {
	start := time.Now()
	s.metrics.open.Inc()
	defer s.metrics.open.Dec()
	// The deadline of the connection's last answer must not hit this one's.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Time{}) // none in tests without a connection
	route, params, err := s.routes.find(hr.Method, hr.URL.Path)
	name, method := "unknown", "other" // bounded label values
	if route != nil {
		name, method = route.pattern, cmp.Or(route.method, "any")
	}
	rec := &recorder{ResponseWriter: w}
	r := &request{Request: hr, params: params, http: rec}
	if err == nil {
		err = s.serve(rec, r, route)
	}
	cut := false
	switch {
	case err == nil:
	case gone(hr, err):
		rec.status = statusGone
	case rec.status != 0: // the answer has begun: a cut connection is the only sign left
		cut = true
	default:
		s.writeError(rec, err)
	}
	s.metrics.done(name, method, rec.status, rec.lasting || r.waited, start)
	s.logRequest(hr, rec.status, time.Since(start), err)
	if cut {
		panic(http.ErrAbortHandler)
	}
}

// statusGone stands in logs and metrics for answers that nobody was there to read.
const statusGone = 499

// logRequest logs what operators should look at as a warning; what users did wrong
// is theirs to see.
func (s *Server) logRequest(r *http.Request, status int, took time.Duration, err error) {
	level := slog.LevelDebug
	attrs := []slog.Attr{
		slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Int("status", status),
		slog.Duration("took", took), slog.String("remote", r.RemoteAddr),
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
		switch cluster.CodeOf(err) {
		case cluster.CodeInternal, cluster.CodeNoLeader, cluster.CodeUnavailable:
			if statusOf(err) >= http.StatusInternalServerError && status != statusGone {
				level = slog.LevelWarn
			}
		}
	}
	s.log.LogAttrs(r.Context(), level, "request", attrs...)
}

// serve runs one handler and writes what it returns.
func (s *Server) serve(w *recorder, r *request, route *route) (err error) {
	defer func() {
		if p := recover(); p != nil {
			if p == http.ErrAbortHandler { //nolint:errorlint // the very value that net/http knows
				panic(p)
			}
			s.log.Error("handler panicked", "path", r.URL.Path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errors.New("internal error: see the server's log")
		}
	}()
	if err := r.parse(s.cfg.Region); err != nil {
		return err
	}
	r.access = route.access
	if err := s.authorize(r); err != nil {
		return err
	}
	out, err := route.handle(s, r)
	if err != nil {
		return err
	}
	if route.access.at == ofBody && !r.decided {
		return fmt.Errorf("route %s %s answered without a decision", route.method, route.pattern)
	}
	if r.waited { // the token may have ended meanwhile
		if err := s.authorize(r); err != nil {
			return err
		}
	}
	switch out := out.(type) {
	case streamFunc:
		w.lasting = true
		return out(w)
	case *answer:
		h := w.Header()
		h.Set("X-Nomad-Index", strconv.FormatUint(out.index, 10))
		if out.read {
			s.readHeaders(h, r.stale)
		}
		if out.next != "" {
			h.Set("X-Nomad-NextToken", out.next)
		}
		if out.err != nil {
			return out.err
		}
		return writeBody(w, r, out.status, out.body)
	case statusBody:
		return writeBody(w, r, out.status, out.body)
	default:
		return writeBody(w, r, http.StatusOK, out)
	}
}

func (s *Server) readHeaders(h http.Header, stale bool) {
	leader, _ := s.cfg.Store.Leader()
	h.Set("X-Nomad-KnownLeader", strconv.FormatBool(leader != ""))
	var contact time.Duration // the leader has just said what is newest
	if stale {
		contact = max(0, s.cfg.Store.LastContact())
	}
	h.Set("X-Nomad-LastContact", strconv.FormatInt(contact.Milliseconds(), 10))
}

// writeError answers with plain text, as Nomad does.
func (s *Server) writeError(w *recorder, err error) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set(codeHeader, string(cluster.CodeOf(err)))
	w.WriteHeader(statusOf(err))
	_, _ = io.WriteString(w, err.Error()) // the client may be gone
}

var gzips = sync.Pool{New: func() any {
	z, _ := gzip.NewWriterLevel(io.Discard, gzip.BestSpeed) // the level is valid
	return z
}}

func writeBody(w *recorder, r *request, status int, body any) error {
	if status == 0 {
		status = http.StatusOK
	}
	var out []byte
	if body != nil {
		var err error
		if _, pretty := r.query["pretty"]; pretty {
			out, err = json.MarshalIndent(body, "", "    ")
			out = append(out, '\n')
		} else {
			out, err = json.Marshal(body)
		}
		if err != nil {
			return fmt.Errorf("encode answer: %w", err)
		}
		w.Header().Set("Content-Type", "application/json")
	}
	w.Header().Set("Vary", "Accept-Encoding")
	if len(out) >= minGzip && acceptsGzip(r.Request) {
		var packed bytes.Buffer
		z := gzips.Get().(*gzip.Writer)
		defer gzips.Put(z)
		z.Reset(&packed)
		if _, err := z.Write(out); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
		out = packed.Bytes()
		w.Header().Set("Content-Encoding", "gzip")
	}
	if status != http.StatusNoContent {
		w.Header().Set("Content-Length", strconv.Itoa(len(out)))
	}
	w.WriteHeader(status)
	if len(out) == 0 {
		return nil
	}
	_, err := w.Write(out)
	return err
}

func acceptsGzip(r *http.Request) bool {
	for _, v := range strings.Split(r.Header.Get("Accept-Encoding"), ",") {
		name, q, _ := strings.Cut(strings.TrimSpace(v), ";")
		if name == "gzip" && strings.TrimSpace(q) != "q=0" {
			return true
		}
	}
	return false
}

// recorder remembers the status and bounds each write.
type recorder struct {
	http.ResponseWriter
	status  int
	lasting bool // a stream: its time says nothing
}

func (w *recorder) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	// A test's recorder has no deadlines; then nothing bounds the write.
	_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(writeTimeout))
	return w.ResponseWriter.Write(p)
}

// Flush implements http.Flusher.
func (w *recorder) Flush() {
	_ = http.NewResponseController(w.ResponseWriter).Flush() // as above
}

// Unwrap is for http.ResponseController.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// decode reads a JSON body of at most MaxBody bytes.
func (r *request) decode(v any) error {
	b, err := r.readAll()
	if err != nil {
		return err
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return errEmpty
	}
	if err := bounded(b); err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		var typed *json.UnmarshalTypeError
		if errors.As(err, &typed) {
			return badRequest("the request body does not fit this call: %s is a JSON %s; expected %s", cmp.Or(typed.Field, "it"), typed.Value, jsonKind(typed.Type))
		}
		return badRequest("the request body is not the JSON that this call takes: %v", err)
	}
	return nil
}

// jsonKind says in words of JSON what a Go type takes.
func jsonKind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Pointer:
		return jsonKind(t.Elem())
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice, reflect.Array:
		return "an array"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return "a whole number"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "a whole number of 0 or more"
	case reflect.Float32, reflect.Float64:
		return "a number"
	}
	return "an object"
}

func (r *request) readAll() ([]byte, error) {
	control := http.NewResponseController(r.http)
	_ = control.SetReadDeadline(time.Now().Add(bodyTimeout)) // none in tests without a connection
	defer func() { _ = control.SetReadDeadline(time.Time{}) }()
	b, err := io.ReadAll(http.MaxBytesReader(r.http, r.Body, MaxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, cluster.Errorf(cluster.CodeTooLarge, "the request body is over the limit of %d bytes", MaxBody)
	case err != nil:
		return nil, badRequest("read request body: %v", err)
	}
	return b, nil
}

// bounded refuses JSON that would take far more memory than its bytes.
func bounded(b []byte) error {
	depth, objects, inString := 0, 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			depth++
			if c == '{' {
				objects++
			}
			if depth > maxNesting {
				return badRequest("the request body is nested more than %d deep", maxNesting)
			}
			if objects > maxObjects {
				return badRequest("the request body has more than %d objects", maxObjects)
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return nil
}

// upload is a body that may be large: it has no size limit here and no limit in
// time as long as bytes keep coming, on the whole at minRate or more, so that nobody
// holds one of the few places for uploads with a byte now and then.
func (r *request) upload() io.Reader {
	return &steady{body: r.Body, control: http.NewResponseController(r.http), start: time.Now()}
}

type steady struct {
	body    io.Reader
	control *http.ResponseController
	start   time.Time
	read    int64
}

func (s *steady) Read(p []byte) (int, error) {
	deadline := time.Now().Add(bodyTimeout)
	if slowest := s.start.Add(2*bodyTimeout + time.Duration(s.read/minRate)*time.Second); slowest.Before(deadline) {
		deadline = slowest
	}
	_ = s.control.SetReadDeadline(deadline) // none in tests without a connection
	n, err := s.body.Read(p)
	s.read += int64(n)
	if err != nil {
		_ = s.control.SetReadDeadline(time.Time{})
	}
	return n, err
}
