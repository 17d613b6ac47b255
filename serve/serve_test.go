package serve

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/serve/ort/onnxtest"
	"github.com/rxvision/rxvision/vision"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testLog(tb testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// started is a real worker on a port of its own.
type started struct {
	*oip.Client
	stop context.CancelFunc
	done chan error
}

// start runs a worker until the test ends, and checks that it ends well.
func start(tb testing.TB, path string, change func(*Config)) *started {
	tb.Helper()
	return startWith(tb, path, change, open)
}

type opener = func(context.Context, string, string, int, *slog.Logger) (*model, error)

func startWith(tb testing.TB, path string, change func(*Config), open opener) *started {
	tb.Helper()
	c := Config{Model: "m", Version: "3", Path: path, Listen: "127.0.0.1:0", Library: onnxtest.Library(tb), Release: "1.2.3"}
	if change != nil {
		change(&c)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &started{stop: cancel, done: make(chan error, 1)}
	addr := make(chan string, 1)
	go func() {
		s.done <- run(ctx, c, testLog(tb), prometheus.NewRegistry(), func(a string) { addr <- a }, open)
	}()
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	tb.Cleanup(func() {
		cancel()
		if err := <-s.done; err != nil {
			tb.Errorf("worker: %v", err)
		}
		transport.CloseIdleConnections()
	})
	select {
	case a := <-addr:
		s.Client = &oip.Client{BaseURL: "http://" + a, HTTP: &http.Client{Transport: transport}}
	case err := <-s.done:
		s.done <- nil
		tb.Fatalf("worker: %v", err)
	}
	return s
}

// send sends one request and gives status, headers and body.
func send(tb testing.TB, client *oip.Client, method, path, body string, header ...string) (int, http.Header, string) {
	tb.Helper()
	req, err := http.NewRequest(method, client.BaseURL+path, strings.NewReader(body))
	if err != nil {
		tb.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.HTTP.Do(req)
	if err != nil {
		tb.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(answer)
}

func raw(v any) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, v)
	if err != nil {
		panic(err)
	}
	return b
}

func TestEveryDatatypeOverHTTP(t *testing.T) {
	for _, tc := range []struct {
		elem   uint64
		tensor oip.Tensor
	}{
		{onnxtest.Bool, oip.Tensor{Datatype: oip.BOOL, Data: []byte{1, 0}}},
		{onnxtest.Uint8, oip.Tensor{Datatype: oip.UINT8, Data: []byte{0, 255}}},
		{onnxtest.Uint16, oip.Tensor{Datatype: oip.UINT16, Data: raw([]uint16{1, 65535})}},
		{onnxtest.Uint32, oip.Tensor{Datatype: oip.UINT32, Data: raw([]uint32{1, math.MaxUint32})}},
		{onnxtest.Uint64, oip.Tensor{Datatype: oip.UINT64, Data: raw([]uint64{1, math.MaxUint64})}},
		{onnxtest.Int8, oip.Tensor{Datatype: oip.INT8, Data: raw([]int8{-128, 127})}},
		{onnxtest.Int16, oip.Tensor{Datatype: oip.INT16, Data: raw([]int16{-32768, 32767})}},
		{onnxtest.Int32, oip.Tensor{Datatype: oip.INT32, Data: raw([]int32{math.MinInt32, math.MaxInt32})}},
		{onnxtest.Int64, oip.Tensor{Datatype: oip.INT64, Data: raw([]int64{math.MinInt64, math.MaxInt64})}},
		{onnxtest.Float16, oip.Tensor{Datatype: oip.FP16, Data: raw([]uint16{0x3c00, 0x7e01})}},
		{onnxtest.BFloat, oip.Tensor{Datatype: oip.BF16, Data: raw([]uint16{0x3f80, 0x7fc1})}},
		{onnxtest.Float, oip.Tensor{Datatype: oip.FP32, Data: raw([]float32{-1.5, math.MaxFloat32})}},
		{onnxtest.Double, oip.Tensor{Datatype: oip.FP64, Data: raw([]float64{0.1, math.MaxFloat64})}},
		{onnxtest.String, oip.FromStrings("", nil, "", "a\x00é")},
	} {
		t.Run(string(tc.tensor.Datatype), func(t *testing.T) {
			w := start(t, onnxtest.Identity(tc.elem, []int64{-1, 2}).Write(t), nil)
			x := tc.tensor
			x.Name, x.Shape = "x", []int64{1, 2}
			y := x
			y.Name = "y"
			want := &oip.Response{ModelName: "m", ModelVersion: "3", ID: "7", Outputs: []oip.Tensor{y}}
			noJSON := x.Datatype == oip.FP16 || x.Datatype == oip.BF16
			for _, way := range []struct{ in, out bool }{{true, true}, {true, false}, {false, true}, {false, false}} {
				r := &oip.Request{ID: "7", Inputs: []oip.Tensor{x}, BinaryOutput: way.out}
				got, err := w.Infer(t.Context(), "m", "3", r, way.in)
				if noJSON && !(way.in && way.out) {
					if err == nil || !strings.Contains(err.Error(), "has no JSON form") {
						t.Errorf("binary %+v: got %+v, %v", way, got, err)
					}
					continue
				}
				if err != nil || !reflect.DeepEqual(got, want) {
					t.Errorf("binary %+v: got %+v, %v\nwant %+v", way, got, err, want)
				}
			}
		})
	}
}

func TestTheSixCalls(t *testing.T) {
	w := start(t, onnxtest.Identity(onnxtest.Float, []int64{-1, 2}, [2]string{"author", "me"}).Write(t), nil)
	infer := `{"id":"1","inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[[1.5,-2]]}],"outputs":[{"name":"y"}]}`
	metadata := `{"name":"m","versions":["3"],"platform":"onnxruntime_onnx","inputs":[{"name":"x","datatype":"FP32","shape":[-1,2]}],` +
		`"outputs":[{"name":"y","datatype":"FP32","shape":[-1,2]}],"properties":{"author":"me"}}`
	answer := `{"model_name":"m","model_version":"3","id":"1","outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[1.5,-2]}]}`
	for _, tc := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/v2", "", 200, `{"name":"rxvision worker","version":"1.2.3","extensions":["binary_tensor_data"]}`},
		{"GET", "/v2/health/live", "", 200, `{"live":true}`},
		{"GET", "/v2/health/ready", "", 200, `{"ready":true}`},
		{"HEAD", "/v2/health/ready", "", 200, ``},
		{"GET", "/v2/models/m", "", 200, metadata},
		{"GET", "/v2/models/m/versions/3", "", 200, metadata},
		{"GET", "/v2/models/m/ready", "", 200, `{"name":"m","ready":true}`},
		{"GET", "/v2/models/m/versions/3/ready", "", 200, `{"name":"m","ready":true}`},
		{"POST", "/v2/models/m/infer", infer, 200, answer},
		{"POST", "/v2/models/m/versions/3/infer", infer, 200, answer},

		{"GET", "/v2/models/other", "", 404, `{"error":"no model \"other\" here: this worker serves \"m\""}`},
		{"GET", "/v2/models/m/versions/4/ready", "", 404, `{"error":"no version \"4\" of model \"m\" here: this worker serves version \"3\""}`},
		{"POST", "/v2/models/other/infer", infer, 404, `{"error":"no model \"other\" here: this worker serves \"m\""}`},
		{"GET", "/v2/models/m/infer", "", 405, `{"error":"/v2/models/m/infer: expected method POST, got GET"}`},
		{"DELETE", "/v2", "", 405, `{"error":"/v2: expected method GET, got DELETE"}`},
		{"GET", "/v3", "", 404, `{"error":"no such path: /v3"}`},
	} {
		status, header, body := send(t, w.Client, tc.method, tc.path, tc.body)
		if status != tc.status || body != tc.want || tc.want != "" && header.Get("Content-Type") != "application/json" {
			t.Errorf("%s %s: got %d %s\nwant %d %s", tc.method, tc.path, status, body, tc.status, tc.want)
		}
	}
	if err := errors.Join(w.Live(t.Context()), w.Ready(t.Context()), w.ModelReady(t.Context(), "m", "3")); err != nil {
		t.Error(err)
	}
	if m, err := w.Metadata(t.Context(), "m", ""); err != nil || m.Properties["author"] != "me" {
		t.Errorf("got %+v, %v", m, err)
	}
	if err := w.ModelReady(t.Context(), "x", ""); oip.StatusOf(err) != 404 {
		t.Error(err)
	}
}

func TestBadRequests(t *testing.T) {
	w := start(t, onnxtest.Identity(onnxtest.Float, []int64{-1, 2}).Write(t), func(c *Config) { c.MaxBody = 1000 })
	x := func(rest string) string { return `{"inputs":[{"name":"x",` + rest + `}]}` }
	for _, tc := range []struct {
		name, body string
		header     []string
		status     int
		want       string
	}{
		{"no JSON", "hello", nil, 400, `expected an inference request, a JSON object, got "hello" at byte 0`},
		{"empty", "", nil, 400, `expected an inference request, a JSON object, got the end of the JSON at byte 0`},
		{"no input", `{"inputs":[]}`, nil, 400, `input "x" is missing: expected FP32 of shape [-1,2]`},
		{"wrong name", `{"inputs":[{"name":"z","shape":[1,2],"datatype":"FP32","data":[1,2]}]}`, nil, 400, `unknown input "z", the model has "x"; input "x" is missing: expected FP32 of shape [-1,2]`},
		{"wrong shape", x(`"shape":[1,3],"datatype":"FP32","data":[1,2,3]`), nil, 400, `input "x": expected shape [-1,2], got [1,3]`},
		{"wrong type", x(`"shape":[1,2],"datatype":"INT64","data":[1,2]`), nil, 400, `input "x": expected datatype FP32, got INT64`},
		{"wrong size", x(`"shape":[1,2],"datatype":"FP32","data":[1,2,3]`), nil, 400, `input "x": data: expected 2 elements, got more`},
		{"wrong binary size", x(`"shape":[1,2],"datatype":"FP32","parameters":{"binary_data_size":4}`) + "1234", []string{oip.HeaderLength, "93"}, 400, `input "x": FP32 of shape [1 2]: expected 2 elements of 4 bytes, got 4 bytes`},
		{"wrong output", `{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}],"outputs":[{"name":"z"}]}`, nil, 400, `unknown output "z", the model has "y"`},
		{"header length", "{}", []string{oip.HeaderLength, "9"}, 400, `Inference-Header-Content-Length is 9, but the body has 2 bytes`},
		{"header no number", "{}", []string{oip.HeaderLength, "-1"}, 400, `Inference-Header-Content-Length: expected a number of bytes, got "-1"`},
		{"compressed", "{}", []string{"Content-Encoding", "gzip"}, 415, `Content-Encoding: expected none, got "gzip"`},
		{"JSON bomb, deep", `{"a":` + strings.Repeat("[", 900), nil, 400, `JSON nested deeper than 64`},
		{"JSON bomb, large", x(`"shape":[1000000000,1000000],"datatype":"FP32","data":[1]`), nil, 400, `input "x": shape [1000000000 1000000]: expected 1000000000000000 elements, got fewer`},
		{"JSON bomb, overflow", x(`"shape":[4611686014132420609,4],"datatype":"FP32","data":[1]`), nil, 400, `input "x": shape [4611686014132420609 4]: the number of elements overflows 63 bits`},
		{"too large", strings.Repeat(" ", 1001), nil, 413, `the body is larger than 1000 bytes, the limit of this worker`},
	} {
		status, _, body := send(t, w.Client, "POST", "/v2/models/m/infer", tc.body, tc.header...)
		want, _ := json.Marshal(oip.ErrorResponse{Error: tc.want})
		if status != tc.status || body != string(want) {
			t.Errorf("%s: got %d %s\nwant %d %s", tc.name, status, body, tc.status, want)
		}
	}
	// Without a length the limit is found while reading.
	resp, err := w.HTTP.Post(w.BaseURL+"/v2/models/m/infer", "application/json", io.MultiReader(strings.NewReader(strings.Repeat(" ", 2000))))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 413 {
		t.Errorf("chunked: got %s", resp.Status)
	}
	if _, err := w.Infer(t.Context(), "m", "", &oip.Request{Inputs: []oip.Tensor{oip.FromFloat32("x", []int64{1, 2}, []float32{1, 2})}}, true); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

func TestMetricsCountWhatHappened(t *testing.T) {
	w := start(t, onnxtest.Identity(onnxtest.Float, []int64{-1, 2}).Write(t), nil)
	for range 3 {
		if _, err := w.Infer(t.Context(), "m", "", &oip.Request{Inputs: []oip.Tensor{oip.FromFloat32("x", []int64{5, 2}, make([]float32, 10))}}, true); err != nil {
			t.Fatal(err)
		}
	}
	send(t, w.Client, "POST", "/v2/models/m/infer", "{")
	_, _, body := send(t, w.Client, "GET", "/metrics", "")
	for _, line := range []string{
		`nv_inference_request_success{model="m",version="3"} 3`,
		`nv_inference_count{model="m",version="3"} 15`,
		`nv_inference_exec_count{model="m",version="3"} 3`,
		`nv_inference_request_failure{model="m",reason="OTHER",version="3"} 1`,
		`nv_inference_request_failure{model="m",reason="REJECTED",version="3"} 0`,
		`nv_inference_pending_request_count{model="m",version="3"} 0`,
		`rxvision_inference_stage_duration_seconds_count{model="m",stage="compute",version="3"} 3`,
	} {
		if !strings.Contains(body, line+"\n") {
			t.Errorf("no line %s in\n%s", line, body)
		}
	}
}

// TestFashion serves the sample model and classifies the real test images, many at once.
func TestFashion(t *testing.T) {
	const path = "../models/fashion/fashion.onnx"
	files, _ := filepath.Glob("../testdata/fashion/*.png")
	if _, err := os.Stat(path); err != nil || len(files) == 0 {
		t.Fatalf("the sample model and its images are part of the source: %v, %d images", err, len(files))
	}
	w := start(t, path, nil)
	meta, err := w.Metadata(t.Context(), "m", "")
	if err != nil {
		t.Fatal(err)
	}
	record, err := vision.Parse(meta)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var right atomic.Int64
	work := make(chan string)
	for range 8 {
		wg.Go(func() {
			for file := range work {
				data, err := os.ReadFile(file)
				if err != nil {
					t.Error(err)
					continue
				}
				im, err := vision.Decode(data, vision.MaxPixels)
				if err != nil {
					t.Errorf("%s: %v", file, err)
					continue
				}
				resp, err := w.Infer(t.Context(), "m", "", &oip.Request{Inputs: []oip.Tensor{record.Tensor(im)}, BinaryOutput: true}, true)
				if err != nil {
					t.Errorf("%s: %v", file, err)
					continue
				}
				classes, err := record.Classify(resp.Outputs, 1)
				if err != nil {
					t.Errorf("%s: %v", file, err)
					continue
				}
				if strings.HasSuffix(file, fmt.Sprintf("-%d.png", classes[0][0].Index)) {
					right.Add(1)
				}
			}
		})
	}
	for _, file := range files {
		work <- file
	}
	close(work)
	wg.Wait()
	if share := float64(right.Load()) / float64(len(files)); share < 0.85 {
		t.Errorf("%.3f of %d images were classified right", share, len(files))
	}
}

func TestModelsThatCannotBeServed(t *testing.T) {
	library := onnxtest.Library(t)
	good := onnxtest.Identity(onnxtest.Float, []int64{1}).Bytes()
	foreign := onnxtest.Identity(onnxtest.Float, []int64{1})
	foreign.Nodes[0].Op, foreign.Nodes[0].Domain = "Sorcery", "rx"
	failing := onnxtest.Model{ // x has no second and third dimension to keep
		Nodes:   []onnxtest.Node{{Op: "Reshape", Inputs: []string{"x", "s"}, Outputs: []string{"y"}}},
		Inputs:  []onnxtest.Value{{Name: "x", Elem: onnxtest.Float, Dims: []int64{2}}, {Name: "s", Elem: onnxtest.Int64, Dims: []int64{3}}},
		Outputs: []onnxtest.Value{{Name: "y", Elem: onnxtest.Float, Dims: []int64{-1}}},
	}
	labels := onnxtest.Identity(onnxtest.Float, []int64{1}, [2]string{vision.KeyLabels, `[""]`})
	for _, tc := range []struct {
		name  string
		bytes []byte
		want  string
	}{
		{"no model", []byte("hello, world"), "model.onnx: not an ONNX model: byte 2 does not begin a field of one"},
		{"truncated", good[:len(good)/2], "model.onnx: truncated ONNX model: the field at byte 17 needs 67 bytes, 27 are left"},
		{"operator", foreign.Bytes(), "model.onnx: operator rx:Sorcery: ONNX Runtime has no such operator (version 1.30.0)"},
		{"metadata", labels.Bytes(), `model.onnx: metadata: rxvision.preprocess: is missing, but other keys for images are there; rxvision.labels: label 0 is empty; rxvision.postprocess: is missing`},
		{"warm-up", failing.Bytes(), ""},
	} {
		path := onnxtest.WriteBytes(t, tc.bytes)
		_, err := Check(t.Context(), path, library)
		t.Logf("%s: %v", tc.name, err)
		if err == nil || tc.want != "" && err.Error() != tc.want || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v\nwant %s", tc.name, err, tc.want)
		}
		c := Config{Model: "m", Path: path, Listen: "127.0.0.1:0", Library: library}
		ctx, cancel := context.WithCancel(t.Context())
		runErr := Run(ctx, c, testLog(t), prometheus.NewRegistry(), func(string) { cancel() })
		cancel()
		if runErr == nil || runErr.Error() != "worker: "+err.Error() {
			t.Errorf("%s: run: got %v\nwant worker: %v", tc.name, runErr, err)
		}
	}
	m, err := Check(t.Context(), onnxtest.WriteBytes(t, good), library)
	if want := (oip.ModelMetadata{
		Name: "model", Platform: "onnxruntime_onnx", Properties: map[string]string{},
		Inputs:  []oip.TensorMetadata{{Name: "x", Datatype: oip.FP32, Shape: []int64{1}}},
		Outputs: []oip.TensorMetadata{{Name: "y", Datatype: oip.FP32, Shape: []int64{1}}},
	}); err != nil || !reflect.DeepEqual(m, want) {
		t.Errorf("got %+v, %v", m, err)
	}
}

func TestConfigFaultsAreAllReported(t *testing.T) {
	err := Run(t.Context(), Config{Threads: -1, MaxConcurrent: 5000, MaxQueue: 1 << 20, MaxBody: -1, DrainTimeout: -1}, testLog(t), prometheus.NewRegistry(), nil)
	want := `worker: model name is missing
model file is missing
listen address is missing
ONNX Runtime library is missing
threads: expected 1 to 1024, got -1
concurrent runs: expected 1 to 1024, got 5000
queue: expected -1 to 65536, got 1048576
body limit: expected 1 to 2147483648, got -1
drain timeout: expected 1ms to 1h0m0s, got -1ns`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = Run(t.Context(), Config{Model: "m", Path: "p", Library: "l", Listen: l.Addr().String()}, testLog(t), prometheus.NewRegistry(), nil)
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("taken port: %v", err)
	}
}

// standIn is a model whose runs last until they are let go.
type standIn struct {
	began chan struct{}
	goOn  chan struct{}
}

func (s *standIn) Run(ctx context.Context, inputs []oip.Tensor, _ []string) ([]oip.Tensor, error) {
	s.began <- struct{}{}
	select {
	case <-s.goOn:
		return inputs, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (s *standIn) Close() {}

// signalling is a real model that says when a run begins.
type signalling struct {
	runner
	began chan struct{}
}

func (s *signalling) Run(ctx context.Context, inputs []oip.Tensor, outputs []string) ([]oip.Tensor, error) {
	s.began <- struct{}{}
	return s.runner.Run(ctx, inputs, outputs)
}

// behind is a worker's HTTP side with a stand-in for the model; without one the model is still loading.
func behind(t *testing.T, c Config, s *standIn) (*worker, *oip.Client) {
	t.Helper()
	c.Model, c.Path, c.Listen, c.Library = "m", "p", "l", "l"
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	m, err := newMetrics(reg, c.Model, c.Version)
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{config: c, log: testLog(t), metrics: m, bodies: budget{limit: heldBodies * c.MaxBody}}
	if s != nil {
		w.model.Store(&model{executor: newGate(s, c.MaxConcurrent, c.MaxQueue, m)})
	}
	server := httptest.NewServer(w.routes(reg))
	t.Cleanup(server.Close)
	return w, &oip.Client{BaseURL: server.URL, HTTP: server.Client()}
}

func TestNotReadyWhileLoadingOrDraining(t *testing.T) {
	w, client := behind(t, Config{}, nil)
	check := func(why string) {
		t.Helper()
		for _, path := range []string{"/v2/health/ready", "/v2/models/m/ready"} {
			status, header, body := send(t, client, "GET", path, "")
			if status != 503 || header.Get("Retry-After") != "1" || !strings.Contains(body, `"ready":false,"error":"`+why+`"}`) {
				t.Errorf("%s: got %d %s", path, status, body)
			}
		}
		if err := client.Live(t.Context()); err != nil {
			t.Error(err)
		}
	}
	check("the model is still loading")
	if status, header, body := send(t, client, "POST", "/v2/models/m/infer", "{}"); status != 503 || header.Get("Retry-After") != "1" || body != `{"error":"model \"m\" is still loading"}` {
		t.Errorf("got %d %s", status, body)
	}
	w.draining.Store(true)
	check("the worker is stopping")
}

// TestStillAnswersWhileItSaysThatItStops is about the time between the two, DrainDelay.
func TestStillAnswersWhileItSaysThatItStops(t *testing.T) {
	s := &standIn{began: make(chan struct{}, 1), goOn: make(chan struct{})}
	close(s.goOn)
	w, client := behind(t, Config{}, s)
	w.draining.Store(true)
	// Clients are told to use another connection, which will be to another worker.
	resp, err := client.HTTP.Post(client.BaseURL+"/v2/models/m/infer", "application/json", strings.NewReader(one))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 || !resp.Close {
		t.Errorf("got %s, close %t", resp.Status, resp.Close)
	}
}

const one = `{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}`

// answers sends n requests at once; each sends its status when it has it.
func answers(t *testing.T, client *oip.Client, n int) chan int {
	t.Helper()
	statuses := make(chan int, n)
	for range n {
		go func() {
			status, _, _ := send(t, client, "POST", "/v2/models/m/infer", one)
			statuses <- status
		}()
	}
	return statuses
}

// counted says whether the metrics have a line.
func counted(t *testing.T, client *oip.Client, line string) bool {
	t.Helper()
	_, _, body := send(t, client, "GET", "/metrics", "")
	return strings.Contains(body, line+"\n")
}

// until waits for a condition that nothing announces.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for !ok() {
		select {
		case <-t.Context().Done():
			t.Fatalf("never: %s", what)
		default:
			runtime.Gosched()
		}
	}
}

func TestQueueFull(t *testing.T) {
	s := &standIn{began: make(chan struct{}, 10), goOn: make(chan struct{})}
	w, client := behind(t, Config{MaxConcurrent: 2, MaxQueue: 3}, s)
	gate := w.model.Load().executor.(*gate)
	statuses := answers(t, client, 5)
	until(t, "two run, three wait", func() bool { return len(s.began) == 2 && gate.waiting.Load() == 3 })
	status, header, body := send(t, client, "POST", "/v2/models/m/infer", one)
	if header.Get(oip.HeaderQueueTime) != "" {
		t.Error("it is told how long a request waited that was refused")
	}
	if status != 429 || header.Get("Retry-After") != "1" || body != `{"error":"the queue of this worker is full: try again later"}` {
		t.Errorf("got %d %s", status, body)
	}
	if !counted(t, client, `nv_inference_pending_request_count{model="m",version=""} 3`) {
		t.Error("the metrics do not show three that wait")
	}
	close(s.goOn)
	for range 5 {
		if status := <-statuses; status != 200 {
			t.Errorf("got %d", status)
		}
	}
	if !counted(t, client, `nv_inference_request_failure{model="m",reason="REJECTED",version=""} 1`) {
		t.Error("the metrics do not show one that was rejected")
	}
	if w.bodies.used.Load() != 0 || gate.waiting.Load() != 0 || len(gate.slots) != 0 {
		t.Error("something is still held")
	}
	_, header, _ = send(t, client, "POST", "/v2/models/m/infer", one)
	if us, err := strconv.ParseInt(header.Get(oip.HeaderQueueTime), 10, 64); err != nil || us < 0 {
		t.Errorf("how long it waited: %v", header)
	}
}

func TestBodiesHeldAreBounded(t *testing.T) {
	s := &standIn{began: make(chan struct{}, 20), goOn: make(chan struct{})}
	w, client := behind(t, Config{MaxConcurrent: 20, MaxBody: int64(len(one))}, s)
	statuses := answers(t, client, heldBodies)
	until(t, "all run", func() bool { return len(s.began) == heldBodies })
	if status, _, body := send(t, client, "POST", "/v2/models/m/infer", one); status != 429 || !strings.Contains(body, "too large to take another one") {
		t.Errorf("got %d %s", status, body)
	}
	close(s.goOn)
	for range heldBodies {
		if status := <-statuses; status != 200 {
			t.Errorf("got %d", status)
		}
	}
	if n := w.bodies.used.Load(); n != 0 {
		t.Errorf("%d bytes are still held", n)
	}
}

func TestRunEndsWhenItsClientGoesAway(t *testing.T) {
	s := &standIn{began: make(chan struct{}, 1), goOn: make(chan struct{})}
	_, client := behind(t, Config{MaxConcurrent: 1}, s)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := client.Infer(ctx, "m", "", &oip.Request{Inputs: []oip.Tensor{oip.FromFloat32("x", []int64{1}, []float32{1})}}, true)
		done <- err
	}()
	<-s.began
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	until(t, "the run has ended", func() bool {
		return counted(t, client, `nv_inference_request_failure{model="m",reason="CANCELED",version=""} 1`)
	})
}

func TestDrainFinishesWhatHasBegun(t *testing.T) {
	s := &standIn{began: make(chan struct{}, 3), goOn: make(chan struct{})}
	w := startWith(t, "path", func(c *Config) {
		c.Library, c.MaxConcurrent = "library", 1
	}, func(context.Context, string, string, int, *slog.Logger) (*model, error) {
		return &model{runner: s}, nil
	})
	statuses := answers(t, w.Client, 3)
	until(t, "one runs, two wait", func() bool {
		return len(s.began) == 1 && counted(t, w.Client, `nv_inference_pending_request_count{model="m",version="3"} 2`)
	})
	w.stop()
	until(t, "new connections are refused", func() bool {
		c, err := net.Dial("tcp", strings.TrimPrefix(w.BaseURL, "http://"))
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(s.goOn)
	for range 3 {
		if status := <-statuses; status != 200 {
			t.Errorf("a request that had begun: got %d", status)
		}
	}
}

func TestStopWhileTheModelLoads(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := Config{Model: "m", Path: "p", Listen: "127.0.0.1:0", Library: "l"}
	err := run(ctx, c, testLog(t), prometheus.NewRegistry(), func(string) { t.Error("ready") },
		func(ctx context.Context, _, _ string, _ int, _ *slog.Logger) (*model, error) {
			cancel()
			return nil, ctx.Err()
		})
	if err != nil {
		t.Error(err)
	}
}

func TestDrainEndsWhatTakesTooLong(t *testing.T) {
	began := make(chan struct{}, 1)
	w := startWith(t, onnxtest.Slow(5000).Write(t), func(c *Config) { c.DrainTimeout = time.Millisecond },
		func(ctx context.Context, path, library string, threads int, log *slog.Logger) (*model, error) {
			m, err := open(ctx, path, library, threads, log)
			if err == nil {
				m.runner = &signalling{m.runner, began}
			}
			return m, err
		})
	x := oip.FromFloat32("x", []int64{700, 700}, make([]float32, 700*700)) // minutes, if nothing ended it
	done := make(chan error)
	go func() {
		_, err := w.Infer(t.Context(), "m", "", &oip.Request{Inputs: []oip.Tensor{x}, BinaryOutput: true}, true)
		done <- err
	}()
	<-began
	w.stop()
	if err := <-done; oip.StatusOf(err) != 503 || err.Error() != errDrained.Message {
		t.Errorf("got %v", err)
	}
}

func BenchmarkFashion(b *testing.B) {
	for _, binary := range []bool{true, false} {
		b.Run(map[bool]string{true: "binary", false: "json"}[binary], func(b *testing.B) {
			w := start(b, "../models/fashion/fashion.onnx", nil)
			r := &oip.Request{Inputs: []oip.Tensor{oip.FromFloat32("images", []int64{1, 1, 28, 28}, make([]float32, 784))}, BinaryOutput: binary}
			b.ReportAllocs()
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := w.Infer(context.Background(), "m", "", r, binary); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
