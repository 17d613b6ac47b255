package gateway

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/oip"
)

// Bounds. A request over one of them is refused at once with the reason.
const (
	DefaultMaxBody     = 64 << 20         // bytes of a request or an answer
	DefaultMaxBodies   = 1 << 30          // bytes of all bodies together; more get 429
	DefaultMaxInFlight = 512              // requests being answered; more get 429
	DefaultMaxHeld     = 256              // requests that wait for a replica; more get 503
	DefaultHold        = 10 * time.Second // how long one waits
	DefaultTimeout     = 60 * time.Second // of a whole request

	firstBuffer  = 64 << 10         // a body's buffer begins with this and grows as bytes come
	bodyPause    = 10 * time.Second // between two pieces of a body
	dialTimeout  = 2 * time.Second  // to a worker
	maxAttempts  = 4
	ejectFor     = time.Second // a replica that cannot be reached rests this long
	maxHeader    = 64 << 10
	reconnectMin = 50 * time.Millisecond
	reconnectMax = 2 * time.Second
)

// Config is what a Gateway is made of; zero limits mean the defaults.
type Config struct {
	Name       string
	Version    string                   // of rxvision, for GET /v2
	Servers    grpc.ClientConnInterface // any server of the region
	RoutesFile string                   // where the last routes are kept; "" for nowhere
	// WorkerTLS configures connections to the worker of an allocation: it shows who
	// this gateway is and accepts that worker only. Nil: workers speak plain text.
	WorkerTLS func(allocID string) *tls.Config

	MaxBody, MaxBodies   int64
	MaxInFlight, MaxHeld int
	Hold, Timeout        time.Duration

	// Authorizer decides who may use models; nil: everyone may. With access control
	// it is a TokenCache.
	Authorizer Authorizer

	Logger   *slog.Logger
	Registry *prometheus.Registry
}

// Gateway answers inference requests. It is an http.Handler; Run keeps its
// routes true.
type Gateway struct {
	cfg     Config
	log     *slog.Logger
	router  *router
	mux     *http.ServeMux
	client  *http.Transport
	turn    atomic.Uint64
	bodies  atomic.Int64 // bytes held
	flights chan struct{}
	held    chan struct{}
	decodes chan struct{} // images being decoded: memory and CPU
	load    *load
	metrics metrics
}

type metrics struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	retries  prometheus.Counter
	ejected  prometheus.Counter
}

// New makes a gateway with the routes that were kept on disk, if any.
func New(cfg Config) (*Gateway, error) {
	defaults := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	defaults(&cfg.MaxInFlight, DefaultMaxInFlight)
	defaults(&cfg.MaxHeld, DefaultMaxHeld)
	if cfg.MaxBody == 0 {
		cfg.MaxBody = DefaultMaxBody
	}
	if cfg.MaxBodies == 0 {
		cfg.MaxBodies = max(DefaultMaxBodies, 2*cfg.MaxBody)
	}
	if cfg.Hold == 0 {
		cfg.Hold = DefaultHold
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	r, err := newRouter(cfg.RoutesFile)
	if err != nil {
		return nil, err
	}
	g := &Gateway{
		cfg: cfg, log: cfg.Logger, router: r, mux: http.NewServeMux(),
		client: &http.Transport{
			DialContext:         dialWorker,
			MaxIdleConns:        4096,
			MaxIdleConnsPerHost: cfg.MaxInFlight,
			IdleConnTimeout:     90 * time.Second,
			DisableCompression:  true,
			WriteBufferSize:     32 << 10,
			ReadBufferSize:      32 << 10,
		},
		flights: make(chan struct{}, cfg.MaxInFlight),
		held:    make(chan struct{}, cfg.MaxHeld),
		decodes: make(chan struct{}, 2*runtime.GOMAXPROCS(0)),
		load:    newLoad(),
		metrics: metrics{
			requests: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "rxvision_gateway_requests_total", Help: "Answered requests by model, call and HTTP status.",
			}, []string{"model", "call", "code"}),
			duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
				Name: "rxvision_gateway_request_duration_seconds", Help: "Time from the request's headers to the answer's last byte.",
				Buckets: prometheus.ExponentialBuckets(0.0002, 2, 18),
			}, []string{"model", "call"}),
			retries: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "rxvision_gateway_retries_total", Help: "Attempts after the first.",
			}),
			ejected: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "rxvision_gateway_ejections_total", Help: "Replicas put to rest because they could not be reached.",
			}),
		},
	}
	cfg.Registry.MustRegister(g.metrics.requests, g.metrics.duration, g.metrics.retries, g.metrics.ejected,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "rxvision_gateway_in_flight", Help: "Requests being answered.",
		}, func() float64 { return float64(len(g.flights)) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "rxvision_gateway_held", Help: "Requests that wait for a replica.",
		}, func() float64 { return float64(len(g.held)) }),
	)
	if cfg.WorkerTLS != nil {
		g.client.DialTLSContext = g.dialSecure
	}
	g.routes()
	return g, nil
}

// Run follows the routes until ctx ends, connecting again with growing pauses.
func (g *Gateway) Run(ctx context.Context) error {
	defer g.client.CloseIdleConnections()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { g.report(ctx) })
	pause := reconnectMin
	for {
		began := time.Now()
		err := g.router.watch(ctx, g.cfg.Servers, g.cfg.Name, func(err error) {
			if err != nil {
				g.log.Warn("routes could not be kept on disk", "error", err)
			}
		})
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > reconnectMax {
			pause = reconnectMin
		}
		g.log.Warn("routes watch broke; going on with the last routes", "error", err, "again_in", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, reconnectMax)
	}
}

// HTTPServer is a server for the gateway with limits on headers and idle time.
func (g *Gateway) HTTPServer() *http.Server {
	return &http.Server{
		Handler: g, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: g.cfg.Timeout, IdleTimeout: 2 * time.Minute,
		WriteTimeout:   2 * g.cfg.Timeout, // a client that does not read its answer must not hold it for ever
		MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
	}
}

// ServeHTTP implements http.Handler.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) { g.mux.ServeHTTP(w, r) }

func (g *Gateway) routes() {
	answer := func(pattern, call string, f func(*request) (any, error), anyOf ...acl.Capability) {
		g.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			g.handle(w, r, call, func(c *request) (any, error) {
				if len(anyOf) > 0 && g.cfg.Authorizer != nil {
					if err := g.cfg.Authorizer.Authorize(c.Context(), acl.Secret(r.Header), c.model, anyOf...); err != nil {
						return nil, err
					}
				}
				return f(c)
			})
		})
		method, path, _ := strings.Cut(pattern, " ")
		g.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", method)
			writeJSON(w, http.StatusMethodNotAllowed, oip.ErrorResponse{Error: fmt.Sprintf("%s: expected method %s, got %s", clip(r.URL.Path), method, clip(r.Method))})
		})
	}
	answer("GET /v2", "server", func(*request) (any, error) {
		return oip.ServerMetadata{Name: "rxvision-gateway", Version: g.cfg.Version, Extensions: []string{"binary_tensor_data"}}, nil
	})
	answer("GET /v2/health/live", "live", func(*request) (any, error) { return oip.LiveResponse{Live: true}, nil })
	answer("GET /v2/health/ready", "ready", func(*request) (any, error) {
		if !g.router.current.Load().known {
			return nil, oip.Errorf(503, "this gateway has not heard from a server yet and knows no routes")
		}
		return oip.ReadyResponse{Ready: true}, nil
	})
	for _, at := range []string{"", "/versions/{version}"} {
		answer("GET /v2/models/{model}"+at, "metadata", g.metadata, acl.ModelRead, acl.ModelInfer)
		answer("GET /v2/models/{model}"+at+"/ready", "model_ready", g.modelReady, acl.ModelRead, acl.ModelInfer)
		answer("POST /v2/models/{model}"+at+"/infer", "infer", g.infer, acl.ModelInfer)
		answer("POST /v1/models/{model}"+at+"/classify", "classify", g.classify, acl.ModelInfer)
	}
	g.mux.Handle("GET /metrics", promhttp.HandlerFor(g.cfg.Registry, promhttp.HandlerOpts{}))
	g.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, http.StatusNotFound, oip.ErrorResponse{Error: fmt.Sprintf("no call %s %s here; GET /v2 describes this server", clip(r.Method), clip(r.URL.Path))})
	})
}

// clip bounds what an answer or a log line repeats of a request.
func clip(s string) string {
	const most = 200 // bytes
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}

// request is one request on its way, with what its log line says.
type request struct {
	*http.Request
	w        http.ResponseWriter
	model    string
	ref      string // version or alias, "" for the newest that is served
	version  uint64
	alloc    string
	attempts int
}

// handle answers one request with the value or the error that f gives, and
// counts and logs it.
func (g *Gateway) handle(w http.ResponseWriter, r *http.Request, name string, f func(*request) (any, error)) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(r.Context(), g.cfg.Timeout)
	defer cancel()
	c := &request{Request: r.WithContext(ctx), w: w, model: r.PathValue("model"), ref: r.PathValue("version")}
	value, err := f(c)
	status := http.StatusOK
	switch v := value.(type) {
	case *answer:
		status = v.status
		if err == nil {
			err = v.write(w)
		}
	default:
		if err == nil {
			writeJSON(w, status, value)
		}
	}
	if err != nil && value == nil {
		status = g.fail(w, r, err)
	}
	label := c.model
	if g.router.current.Load().models[label] == nil {
		label = "" // an unknown name must not become a label
	}
	took := time.Since(began)
	g.metrics.requests.WithLabelValues(label, name, strconv.Itoa(status)).Inc()
	g.metrics.duration.WithLabelValues(label, name).Observe(took.Seconds())
	attrs := []slog.Attr{
		slog.String("method", r.Method), slog.String("path", clip(r.URL.Path)), slog.Int("status", status),
		slog.Duration("took", took), slog.String("client", r.RemoteAddr),
	}
	if c.model != "" {
		attrs = append(attrs, slog.String("model", clip(c.model)), slog.Uint64("version", c.version), slog.String("alloc", c.alloc), slog.Int("attempts", c.attempts))
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	g.log.LogAttrs(r.Context(), slog.LevelInfo, "request", attrs...)
}

// fail writes an error as {"error": …} with its status.
func (g *Gateway) fail(w http.ResponseWriter, r *http.Request, err error) int {
	var big *http.MaxBytesError
	status := oip.StatusOf(err)
	switch {
	case errors.As(err, &big):
		status, err = http.StatusRequestEntityTooLarge, fmt.Errorf("the body is larger than this gateway's limit of %d bytes", big.Limit)
	case r.Context().Err() != nil:
		status = 499 // the client has gone
	case errors.Is(err, context.DeadlineExceeded):
		status, err = http.StatusGatewayTimeout, fmt.Errorf("no answer within %s", g.cfg.Timeout)
	case status == 0:
		status = http.StatusInternalServerError
	}
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, status, oip.ErrorResponse{Error: err.Error()})
	return status
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status, b = http.StatusInternalServerError, []byte(`{"error":"the answer cannot be written as JSON"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = w.Write(b) // a client that has gone is no fault of ours
}

func (g *Gateway) metadata(c *request) (any, error) {
	versions, missing := g.router.current.Load().find(c.model, c.ref)
	if missing != nil {
		return nil, missing
	}
	v := served(versions)
	c.version = v.number
	m := v.metadata
	if c.ref == "" {
		m.Versions = nil
		for i := len(versions) - 1; i >= 0; i-- {
			m.Versions = append(m.Versions, strconv.FormatUint(versions[i].number, 10))
		}
	}
	return m, nil
}

func (g *Gateway) modelReady(c *request) (any, error) {
	versions, missing := g.router.current.Load().find(c.model, c.ref)
	if missing != nil {
		return nil, missing
	}
	v, _ := pick(versions, nil, 0, time.Now())
	if v == nil {
		why, _ := unserved(c.model, versions)
		return nil, why
	}
	c.version = v.number
	return oip.ReadyResponse{Name: c.model, Ready: true}, nil
}

// body reads the request's body, before the request takes a place among those in
// flight: a client that sends slowly holds up nobody but itself. The bytes count
// against what all requests may hold, as they come and not as they are announced,
// until release.
func (g *Gateway) body(c *request) (b []byte, release func(), err error) {
	if e := c.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return nil, nil, oip.Errorf(415, "Content-Encoding: expected none, got %q", clip(e))
	}
	if c.ContentLength > g.cfg.MaxBody {
		return nil, nil, &http.MaxBytesError{Limit: g.cfg.MaxBody}
	}
	var held int64
	release = func() { g.bodies.Add(-held) }
	defer func() {
		if err != nil {
			release()
		}
	}()
	control := http.NewResponseController(c.w)
	defer func() { _ = control.SetReadDeadline(time.Time{}) }() // or it would end the request later
	end := time.Now().Add(g.cfg.Timeout)
	r := http.MaxBytesReader(c.w, c.Body, g.cfg.MaxBody)
	for {
		if len(b) == cap(b) {
			size := max(4*int64(cap(b)), firstBuffer)
			if c.ContentLength >= 0 {
				size = min(size, c.ContentLength+1) // one more, so that the end is found without growing
			}
			size = min(size, g.cfg.MaxBody+1)
			held += size - int64(cap(b))
			if g.bodies.Add(size-int64(cap(b))) > g.cfg.MaxBodies {
				return nil, nil, oip.Errorf(429, "the requests at this gateway hold %d MiB already; try again in a moment", g.cfg.MaxBodies>>20)
			}
			b = append(make([]byte, 0, size), b...)
		}
		// A recorder in tests has no deadlines; then nothing bounds the read.
		_ = control.SetReadDeadline(earlier(end, time.Now().Add(bodyPause)))
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		var big *http.MaxBytesError
		switch {
		case errors.Is(err, io.EOF):
			return b, release, nil
		case errors.As(err, &big):
			return nil, nil, big
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, nil, oip.Errorf(408, "the body did not come in time: %d bytes did, then none for %s or not all within %s", len(b), bodyPause, g.cfg.Timeout)
		case err != nil:
			return nil, nil, oip.Errorf(400, "the body ended early, after %d bytes", len(b))
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// enter takes a place among the requests in flight, or refuses.
func (g *Gateway) enter() (leave func(), err error) {
	select {
	case g.flights <- struct{}{}:
		return func() { <-g.flights }, nil
	default:
		return nil, oip.Errorf(429, "this gateway is answering %d requests already; try again in a moment", g.cfg.MaxInFlight)
	}
}

func (g *Gateway) infer(c *request) (any, error) {
	body, release, err := g.body(c)
	if err != nil {
		return nil, err
	}
	defer release()
	leave, err := g.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	head := http.Header{}
	for _, k := range []string{"Content-Type", oip.HeaderLength, "X-Request-Id"} {
		if v := c.Header.Get(k); v != "" {
			head.Set(k, v)
		}
	}
	a, err := g.forward(c, nil, func(*version) (http.Header, [][]byte, error) { return head, [][]byte{body}, nil })
	if err != nil {
		return nil, err
	}
	return a, nil
}
