package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/oip"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// region is a real gRPC server that streams whatever routes the test sets.
type region struct {
	pb.UnimplementedFleetServer
	addr string
	stop func()

	tokens  map[string]*pb.ResolveTokenReply // by hash
	reports chan *pb.Samples                 // nil: they are not taken

	mu      sync.Mutex
	updates []*pb.RoutesUpdate
	more    chan struct{}
}

func startRegion(t *testing.T) *region {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &region{addr: l.Addr().String(), more: make(chan struct{})}
	s := grpc.NewServer()
	pb.RegisterFleetServer(s, r)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	r.stop = sync.OnceFunc(func() { s.Stop(); <-done })
	t.Cleanup(r.stop)
	return r
}

func (r *region) Routes(_ *pb.RoutesRequest, stream pb.Fleet_RoutesServer) error {
	for i := 0; ; {
		r.mu.Lock()
		rest, more := r.updates[i:], r.more
		r.mu.Unlock()
		for _, u := range rest {
			if err := stream.Send(u); err != nil {
				return err
			}
			i++
		}
		select {
		case <-more:
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (r *region) send(u *pb.RoutesUpdate) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.updates = append(r.updates, u)
	close(r.more)
	r.more = make(chan struct{})
}

var pictures = map[string]string{
	"rxvision.labels":      `["dark","bright"]`,
	"rxvision.preprocess":  `{"input":"x","width":2,"height":2,"channels":1,"layout":"NCHW","scale":1,"mean":[0],"std":[1]}`,
	"rxvision.postprocess": `{"output":"y","activation":"softmax"}`,
}

// routesFor serves version 1 of model m at the given addresses; a leading "-" means not ready.
func routesFor(properties map[string]string, addrs ...string) *pb.RoutesUpdate {
	v := &pb.VersionRoute{Version: 1, Record: cluster.Marshal(&cluster.ModelVersion{
		Model: "m", Version: 1, Platform: "onnxruntime_onnx", Properties: properties,
		Inputs:  []cluster.TensorSpec{{Name: "x", Datatype: "FP32", Shape: []int64{-1, 1, 2, 2}}},
		Outputs: []cluster.TensorSpec{{Name: "y", Datatype: "FP32", Shape: []int64{-1, 2}}},
	})}
	for i, a := range addrs {
		address, notReady := strings.CutPrefix(a, "-")
		v.Endpoints = append(v.Endpoints, &pb.Endpoint{AllocId: fmt.Sprintf("alloc-%d", i), Address: address, Ready: !notReady})
	}
	return &pb.RoutesUpdate{Full: true, Models: []*pb.ModelRoute{{Name: "m", Aliases: map[string]uint64{"production": 1}, Versions: []*pb.VersionRoute{v}}}}
}

func startGateway(t *testing.T, r *region, change func(*Config)) (*Gateway, *httptest.Server) {
	conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Name: "g", Servers: conn, Logger: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()}
	if change != nil {
		change(&cfg)
	}
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Run(ctx) }()
	srv := httptest.NewServer(g)
	t.Cleanup(func() {
		srv.Close()
		cancel()
		<-done
		conn.Close()
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	})
	return g, srv
}

// until waits for the gateway's routes to satisfy ok.
func until(t *testing.T, g *Gateway, ok func(*table) bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		tb := g.router.current.Load()
		if ok(tb) {
			return
		}
		select {
		case <-tb.changed:
		case <-deadline:
			t.Fatal("the routes did not come")
		}
	}
}

func ready(n int) func(*table) bool {
	return func(tb *table) bool { return tb.models["m"] != nil && len(tb.models["m"].versions[0].ready) == n }
}

// worker answers each infer call through f and counts them.
func worker(t *testing.T, f http.HandlerFunc) (addr string, calls *atomic.Int64) {
	calls = new(atomic.Int64)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		f(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), calls
}

func echo(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, "%s %s", r.URL.Path, b)
}

func post(t *testing.T, url string, body []byte) (int, string, http.Header) {
	t.Helper()
	resp, err := http.Post(url, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), resp.Header
}

func TestInferReachesAReplicaByVersionAndAlias(t *testing.T) {
	r := startRegion(t)
	g, srv := startGateway(t, r, nil)
	if code, body, _ := post(t, srv.URL+"/v2/models/m/infer", nil); code != 503 || !strings.Contains(body, "has not heard from a server") {
		t.Errorf("before any route: %d %s", code, body)
	}
	addr, _ := worker(t, echo)
	r.send(routesFor(nil, addr))
	until(t, g, ready(1))
	for _, path := range []string{"/v2/models/m/infer", "/v2/models/m/versions/1/infer", "/v2/models/m/versions/production/infer"} {
		if code, body, _ := post(t, srv.URL+path, []byte("hello")); code != 200 || body != "/v2/models/m/versions/1/infer hello" {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	for path, want := range map[string]string{
		"/v2/models/nope/infer":            `unknown model`,
		"/v2/models/m/versions/2/infer":    `has no version`,
		"/v2/models/m/versions/beta/infer": `has no version or alias`,
		"/v2/nonsense":                     `no call POST /v2/nonsense`,
	} {
		if code, body, _ := post(t, srv.URL+path, []byte("{}")); code != 404 || !strings.Contains(body, want) {
			t.Errorf("%s: %d %s, want 404 and %q", path, code, body, want)
		}
	}
}

func TestDeadReplicaCostsARetryNotAnAnswer(t *testing.T) {
	r := startRegion(t)
	g, srv := startGateway(t, r, nil)
	good, _ := worker(t, echo)
	draining, _ := worker(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "draining", 503) })
	breaking, _ := worker(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = w.Write([]byte("half"))
		panic(http.ErrAbortHandler)
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	r.send(routesFor(nil, dead, draining, breaking, good))
	until(t, g, ready(4))
	for range 40 {
		if code, body, _ := post(t, srv.URL+"/v2/models/m/infer", []byte("x")); code != 200 || !strings.HasSuffix(body, " x") {
			t.Fatalf("%d %s", code, body)
		}
	}
}

func TestRequestWaitsForAReplica(t *testing.T) {
	r := startRegion(t)
	g, srv := startGateway(t, r, func(c *Config) { c.MaxHeld = 1; c.Hold = time.Minute })
	addr, _ := worker(t, echo)
	r.send(routesFor(nil, "-"+addr))
	until(t, g, func(tb *table) bool { return tb.models["m"] != nil })
	first := make(chan string, 1)
	go func() {
		resp, err := http.Post(srv.URL+"/v2/models/m/infer", "application/json", strings.NewReader("x"))
		if err != nil {
			first <- err.Error()
			return
		}
		resp.Body.Close()
		first <- resp.Status
	}()
	for len(g.held) == 0 {
		time.Sleep(time.Millisecond)
	}
	if code, body, h := post(t, srv.URL+"/v2/models/m/infer", []byte("x")); code != 503 || !strings.Contains(body, "1 requests wait") || h.Get("Retry-After") == "" {
		t.Errorf("over the limit of waiting requests: %d %s", code, body)
	}
	r.send(routesFor(nil, addr))
	if got := <-first; got != "200 OK" {
		t.Errorf("the waiting request got %s", got)
	}
	r.send(routesFor(nil))
	until(t, g, ready(0))
	if code, body, _ := post(t, srv.URL+"/v2/models/m/infer", nil); code != 503 || !strings.Contains(body, "no job serves it") {
		t.Errorf("registered but not served: %d %s", code, body)
	}
}

func TestLimits(t *testing.T) {
	r := startRegion(t)
	release := make(chan struct{})
	busy, calls := worker(t, func(w http.ResponseWriter, _ *http.Request) { <-release; fmt.Fprint(w, "{}") })
	g, srv := startGateway(t, r, func(c *Config) { c.MaxInFlight = 1; c.MaxBody = 1000 })
	r.send(routesFor(nil, busy))
	until(t, g, ready(1))
	if code, body, _ := post(t, srv.URL+"/v2/models/m/infer", make([]byte, 1001)); code != 413 || !strings.Contains(body, "limit of 1000 bytes") {
		t.Errorf("large body: %d %s", code, body)
	}
	done := make(chan int, 1)
	go func() {
		resp, err := http.Post(srv.URL+"/v2/models/m/infer", "", strings.NewReader("x"))
		if err != nil {
			done <- 0
			return
		}
		resp.Body.Close()
		done <- resp.StatusCode
	}()
	for calls.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	if code, body, h := post(t, srv.URL+"/v2/models/m/infer", []byte("x")); code != 429 || h.Get("Retry-After") == "" {
		t.Errorf("second request in flight: %d %s", code, body)
	}
	close(release)
	if code := <-done; code != 200 {
		t.Errorf("first request: %d", code)
	}
	full, _ := worker(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "queue is full", 429) })
	r.send(routesFor(nil, full))
	until(t, g, func(tb *table) bool { return ready(1)(tb) && tb.models["m"].versions[0].ready[0].address == full })
	if code, body, _ := post(t, srv.URL+"/v2/models/m/infer", []byte("x")); code != 429 || !strings.Contains(body, "busy") {
		t.Errorf("full replica: %d %s", code, body)
	}
}

func picture(t *testing.T, shade uint8) []byte {
	im := image.NewGray(image.Rect(0, 0, 2, 2))
	for i := range im.Pix {
		im.Set(i%2, i/2, color.Gray{shade})
	}
	var b bytes.Buffer
	if err := png.Encode(&b, im); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// brightness answers as a model would that compares the mean pixel with 100.
func brightness(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	n, err := oip.ParseHeaderLength(r.Header)
	if err != nil {
		http.Error(w, err.Error(), 400)
		return
	}
	req, err := oip.DecodeRequest(body, n)
	if err != nil || len(req.Inputs) != 1 || req.Inputs[0].Name != "x" {
		http.Error(w, fmt.Sprint("bad request ", err), 400)
		return
	}
	values, _ := req.Inputs[0].Floats()
	mean := 0.0
	for _, v := range values {
		mean += v / float64(len(values))
	}
	resp := oip.Response{ModelName: "m", ModelVersion: "1", Outputs: []oip.Tensor{oip.FromFloat32("y", []int64{1, 2}, []float32{100, float32(mean)})}}
	head, tail, err := resp.Encode(nil, req)
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	w.Header().Set(oip.HeaderLength, strconv.Itoa(len(head)))
	for _, part := range append([][]byte{head}, tail...) {
		_, _ = w.Write(part)
	}
}

func TestClassify(t *testing.T) {
	r := startRegion(t)
	g, srv := startGateway(t, r, nil)
	addr, _ := worker(t, brightness)
	r.send(routesFor(pictures, addr))
	until(t, g, ready(1))
	for shade, want := range map[uint8]string{10: "dark", 200: "bright"} {
		code, body, _ := post(t, srv.URL+"/v1/models/m/classify?top_k=1", picture(t, shade))
		var c Classification
		if err := json.Unmarshal([]byte(body), &c); err != nil || code != 200 || len(c.Classes) != 1 || c.Classes[0].Label != want || c.Classes[0].Probability < 0.99 || c.Version != 1 {
			t.Errorf("shade %d: %d %s (%v), want %s", shade, code, body, err, want)
		}
	}
	for what, bad := range map[string]struct {
		body []byte
		path string
		code int
	}{
		"no picture":   {[]byte("hello"), "", 415},
		"empty":        {nil, "", 400},
		"cut off":      {picture(t, 1)[:40], "", 400},
		"top_k":        {picture(t, 1), "?top_k=0", 400},
		"huge picture": {hugePNG(), "", 413},
	} {
		if code, body, _ := post(t, srv.URL+"/v1/models/m/classify"+bad.path, bad.body); code != bad.code || !strings.HasPrefix(body, `{"error":`) {
			t.Errorf("%s: %d %s, want %d", what, code, body, bad.code)
		}
	}
	r.send(routesFor(nil, addr))
	until(t, g, func(tb *table) bool { return ready(1)(tb) && tb.models["m"].versions[0].images == nil })
	if code, body, _ := post(t, srv.URL+"/v1/models/m/classify", picture(t, 1)); code != 422 || !strings.Contains(body, "takes no images") {
		t.Errorf("model without metadata: %d %s", code, body)
	}
}

// hugePNG is the start of a PNG that claims 10,000 × 10,000 pixels.
func hugePNG() []byte {
	im := image.NewGray(image.Rect(0, 0, 10000, 10000))
	var b bytes.Buffer
	_ = png.Encode(&b, im)
	return b.Bytes()
}

func TestStartsFromKeptRoutesWithAllServersDown(t *testing.T) {
	file := filepath.Join(t.TempDir(), "routes")
	r := startRegion(t)
	g, _ := startGateway(t, r, func(c *Config) { c.RoutesFile = file })
	addr, _ := worker(t, echo)
	r.send(routesFor(nil, addr))
	until(t, g, ready(1))
	for { // kept soon after it is used
		if again, err := newRouter(file); err == nil && ready(1)(again.current.Load()) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	r.stop()
	_, srv := startGateway(t, r, func(c *Config) { c.RoutesFile = file })
	if code, body, _ := post(t, srv.URL+"/v2/models/m/infer", []byte("x")); code != 200 {
		t.Errorf("with all servers down: %d %s", code, body)
	}
}

func TestUnknownModelsMakeNoMetrics(t *testing.T) {
	r := startRegion(t)
	g, srv := startGateway(t, r, nil)
	r.send(routesFor(nil))
	until(t, g, func(tb *table) bool { return tb.known })
	for i := range 5 {
		post(t, fmt.Sprintf("%s/v2/models/x%d/infer", srv.URL, i), nil)
	}
	families, err := g.cfg.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "rxvision_gateway_requests_total" && len(f.Metric) != 1 {
			t.Errorf("%d label sets, want one for all unknown models", len(f.Metric))
		}
	}
}
