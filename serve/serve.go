// Package serve is the worker: a process that serves one ONNX model by the Open Inference Protocol over HTTP.
//
// It listens at once and says that it is alive, loads the model, runs it once so that the first request finds it warm, and is
// ready from then on. A bounded number of runs go on at the same time, a bounded number of requests waits for a turn, the bodies
// held at once are bounded in bytes; what exceeds that is answered 429 with Retry-After. When its context ends it says that it is
// not ready, finishes what it has begun, and returns.
package serve

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/serve/ort"
	"github.com/rxvision/rxvision/vision"
)

// Defaults and limits of a Config.
const (
	DefaultMaxQueue     = 256
	DefaultMaxBody      = 64 << 20
	DefaultDrainTimeout = 30 * time.Second
	limitConcurrent     = 1024
	limitQueue          = 1 << 16
	limitBody           = 2 << 30
)

// heldBodies times MaxBody is how many bytes of bodies are held at once.
const heldBodies = 8

// Bounds on what a peer may take its time for.
const (
	headerTimeout = 10 * time.Second
	bodyTimeout   = 60 * time.Second
	writeTimeout  = 60 * time.Second
	idleTimeout   = 2 * time.Minute
	maxRequest    = 10 * time.Minute // from the end of the headers, when nothing else bounds it
	maxHeader     = 64 << 10
	closeTimeout  = 5 * time.Second // for runs that were told to end
	freshTimeout  = 250 * time.Millisecond
)

// Config says what a worker serves and how much at once. A zero means the default.
type Config struct {
	Model   string      // its name in URLs
	Version string      // its version in URLs; when empty no version can be asked for
	Path    string      // the model file
	Listen  string      // host:port; port 0 chooses a free one
	Library string      // path of ONNX Runtime's shared library
	TLS     *tls.Config // for the listener: says who may call; nil: plain text
	Release string      // version of this program, shown by GET /v2

	Threads       int   // of one run; default 1
	MaxConcurrent int   // runs at once; default GOMAXPROCS / Threads
	MaxQueue      int   // requests that wait; default DefaultMaxQueue, negative: none
	MaxBody       int64 // bytes of a request's body; default DefaultMaxBody

	// DrainDelay is how long requests are still taken after the worker began to say that it is not ready; default none.
	DrainDelay time.Duration
	// DrainTimeout is how long requests that have begun may take after that; default DefaultDrainTimeout.
	DrainTimeout time.Duration
}

// number puts a default in the place of 0 and adds a fault when the value is out of bounds.
func number[T int | int64 | time.Duration](faults *[]error, name string, v *T, low, high, byDefault T) {
	if *v == 0 {
		*v = byDefault
	}
	if *v < low || *v > high {
		*faults = append(*faults, fmt.Errorf("%s: expected %v to %v, got %v", name, low, high, *v))
	}
}

// check fills in defaults and reports every fault.
func (c *Config) check() error {
	var faults []error
	text := func(name, v string) {
		if v == "" {
			faults = append(faults, fmt.Errorf("%s is missing", name))
		}
	}
	text("model name", c.Model)
	text("model file", c.Path)
	text("listen address", c.Listen)
	text("ONNX Runtime library", c.Library)
	number(&faults, "threads", &c.Threads, 1, ort.MaxThreads, 1)
	concurrent := runtime.GOMAXPROCS(0) / max(1, c.Threads)
	number(&faults, "concurrent runs", &c.MaxConcurrent, 1, limitConcurrent, min(max(1, concurrent), limitConcurrent))
	number(&faults, "queue", &c.MaxQueue, -1, limitQueue, DefaultMaxQueue)
	c.MaxQueue = max(0, c.MaxQueue)
	number(&faults, "body limit", &c.MaxBody, 1, limitBody, DefaultMaxBody)
	number(&faults, "drain delay", &c.DrainDelay, 0, time.Hour, 0)
	number(&faults, "drain timeout", &c.DrainTimeout, time.Millisecond, time.Hour, DefaultDrainTimeout)
	return errors.Join(faults...)
}

// model is an opened, warm model.
type model struct {
	runner   runner
	executor executor
	metadata oip.ModelMetadata
	batched  bool // the first dimension of every input may vary
}

// open opens a model file, checks its metadata and runs it once.
func open(ctx context.Context, path, library string, threads int, log *slog.Logger) (_ *model, err error) {
	if err := ort.Load(library, log); err != nil {
		return nil, err
	}
	session, err := ort.Open(path, ort.Options{Threads: threads})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			session.Close()
		}
	}()
	m := &model{runner: session, metadata: oip.ModelMetadata{
		Name: strings.TrimSuffix(filepath.Base(path), filepath.Ext(path)), Platform: "onnxruntime_onnx",
		Inputs: session.Inputs(), Outputs: session.Outputs(), Properties: session.Properties(),
	}}
	m.batched = len(m.metadata.Inputs) > 0 && !slices.ContainsFunc(m.metadata.Inputs, func(t oip.TensorMetadata) bool {
		return len(t.Shape) == 0 || t.Shape[0] >= 0
	})
	record, err := vision.Parse(m.metadata)
	if err != nil {
		return nil, fmt.Errorf("%s: metadata: %s", filepath.Base(path), strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	inputs, certain := zeros(m.metadata.Inputs)
	if record != nil {
		inputs, certain = []oip.Tensor{record.WarmUp()}, true
	}
	if _, err := session.Run(ctx, inputs, nil); err != nil {
		if certain || ctx.Err() != nil {
			return nil, fmt.Errorf("%s: warm-up: %w", filepath.Base(path), err)
		}
		log.Warn("warm-up failed; the model may not take dimensions of 1 where it leaves them open", "error", err)
	}
	return m, nil
}

// zeros makes an input of zeros and empty strings, with 1 for each dimension that may vary; certain is false when there
// are any.
func zeros(inputs []oip.TensorMetadata) (tensors []oip.Tensor, certain bool) {
	certain = true
	for _, in := range inputs {
		shape := slices.Clone(in.Shape)
		for i, d := range shape {
			if d < 0 {
				shape[i], certain = 1, false
			}
		}
		n, err := oip.Elements(shape)
		size := int64(in.Datatype.Size())
		if size == 0 {
			size = 4 // the length of an empty string
		}
		const most = 1 << 30
		if err != nil || n > most/size {
			n, certain = 0, false // the run will say so
		}
		certain = certain && len(shape) > 0 // no shape can mean any
		tensors = append(tensors, oip.Tensor{Name: in.Name, Datatype: in.Datatype, Shape: shape, Data: make([]byte, n*size)})
	}
	return tensors, certain
}

// Check loads a model, runs it once and checks its metadata, and returns what it says of itself; its name is the file's.
// It is meant for a process of its own with limits, because a hostile model can take memory and time, or crash it.
func Check(ctx context.Context, path, library string) (oip.ModelMetadata, error) {
	m, err := open(ctx, path, library, 1, slog.New(slog.DiscardHandler))
	if err != nil {
		return oip.ModelMetadata{}, err
	}
	defer m.runner.Close()
	return m.metadata, nil
}

// worker is a running worker.
type worker struct {
	config   Config
	log      *slog.Logger
	metrics  *metrics
	model    atomic.Pointer[model] // nil until it is warm
	draining atomic.Bool
	bodies   budget
	fresh    fresh
}

// errDrained ends requests that took longer than a drain may.
var errDrained = oip.Errorf(http.StatusServiceUnavailable, "the worker is stopping and could not wait for this request any longer")

// Run serves until ctx ends, drains, and returns nil; or returns why it could not serve. ready is called once, with the
// address that it listens on, when the model is warm.
func Run(ctx context.Context, c Config, log *slog.Logger, reg *prometheus.Registry, ready func(addr string)) error {
	return run(ctx, c, log, reg, ready, open)
}

// run is Run with the way to open a model.
func run(ctx context.Context, c Config, log *slog.Logger, reg *prometheus.Registry, ready func(addr string),
	open func(ctx context.Context, path, library string, threads int, log *slog.Logger) (*model, error),
) error {
	if err := c.check(); err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	m, err := newMetrics(reg, c.Model, c.Version)
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	w := &worker{config: c, log: log.With("model", c.Model), metrics: m, bodies: budget{limit: heldBodies * c.MaxBody}}
	listener, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	if c.TLS != nil {
		listener = tls.NewListener(listener, c.TLS)
	}
	life, end := context.WithCancelCause(context.WithoutCancel(ctx)) // of requests
	defer end(nil)
	server := &http.Server{
		Handler:           w.routes(reg),
		BaseContext:       func(net.Listener) context.Context { return life },
		ConnState:         w.fresh.track,
		ErrorLog:          slog.NewLogLogger(w.log.Handler(), slog.LevelWarn),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		WriteTimeout:      maxRequest,
		MaxHeaderBytes:    maxHeader,
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	model, err := open(ctx, c.Path, c.Library, c.Threads, w.log)
	if err != nil {
		if ctx.Err() != nil { // told to stop while it loaded
			return w.stop(server, end, served)
		}
		return errors.Join(fmt.Errorf("worker: %w", err), w.stop(server, end, served))
	}
	defer model.runner.Close() // after stop: no request runs any more
	model.metadata.Name = c.Model
	if c.Version != "" {
		model.metadata.Versions = []string{c.Version}
	}
	model.executor = newGate(model.runner, c.MaxConcurrent, c.MaxQueue, m)
	w.model.Store(model)
	w.log.Info("model is ready", "version", c.Version, "address", listener.Addr().String(), "onnxruntime", ort.Version(),
		"threads", c.Threads, "concurrent", c.MaxConcurrent)
	ready(listener.Addr().String())

	select {
	case err := <-served:
		served <- err
		return w.stop(server, end, served)
	case <-ctx.Done():
	}
	w.draining.Store(true)
	w.log.Info("worker drains", "delay", c.DrainDelay, "timeout", c.DrainTimeout)
	delay := time.NewTimer(c.DrainDelay)
	defer delay.Stop()
	select {
	case <-delay.C:
	case err := <-served:
		served <- err
	}
	return w.stop(server, end, served)
}

// stop ends the server: requests that have begun get DrainTimeout, then their runs are ended. It returns what went wrong
// with that, and what had ended Serve before.
func (w *worker) stop(server *http.Server, end context.CancelCauseFunc, served <-chan error) error {
	ctx, cancel := context.WithTimeout(context.Background(), w.config.DrainTimeout)
	defer cancel()
	unused := time.AfterFunc(freshTimeout, w.fresh.close)
	defer unused.Stop()
	err := server.Shutdown(ctx)
	if err != nil {
		w.log.Warn("drain took too long; the requests that are left are ended", "timeout", w.config.DrainTimeout)
		end(errDrained)
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		if err = server.Shutdown(ctx); err != nil {
			err = errors.Join(fmt.Errorf("worker: stop: %w", err), server.Close())
		}
	}
	if e := <-served; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(fmt.Errorf("worker: %w", e), err)
	}
	return err
}

// fresh holds the connections that have not sent anything yet. Shutdown would wait seconds for a request on them; clients keep
// such connections in store.
type fresh struct {
	mu    sync.Mutex
	conns map[net.Conn]bool
}

// track follows a connection's state.
func (f *fresh) track(c net.Conn, state http.ConnState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if state != http.StateNew {
		delete(f.conns, c)
		return
	}
	if f.conns == nil {
		f.conns = map[net.Conn]bool{}
	}
	f.conns[c] = true
}

func (f *fresh) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		_ = c.Close() // nothing is lost on it
	}
}
