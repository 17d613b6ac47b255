package oip

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

// echo answers an inference request with its inputs as outputs, the way it was asked to.
func echo(t *testing.T) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || int64(len(body)) != r.ContentLength {
			t.Errorf("got %d bytes of %d, %v", len(body), r.ContentLength, err)
		}
		n, err := ParseHeaderLength(r.Header)
		if err != nil {
			t.Error(err)
		}
		req, err := DecodeRequest(body, n)
		if err != nil {
			t.Error(err)
			return
		}
		head, tail, err := (&Response{ModelName: r.PathValue("model"), ModelVersion: r.PathValue("version"), Outputs: req.Inputs}).Encode(nil, req)
		if err != nil {
			t.Error(err)
			return
		}
		if tail != nil {
			w.Header().Set(HeaderLength, strconv.Itoa(len(head)))
		}
		_, _ = w.Write(join(head, tail))
	}
}

func TestClientInfer(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /base/v2/models/{model}/versions/{version}/infer", echo(t))
	server := httptest.NewServer(mux)
	defer server.Close()
	c := &Client{BaseURL: server.URL + "/base/", HTTP: server.Client()}
	x := []Tensor{FromFloat32("x", []int64{2}, []float32{1, 2}), FromStrings("s", []int64{1}, "a")}
	for _, in := range []bool{true, false} {
		for _, out := range []bool{true, false} {
			got, err := c.Infer(t.Context(), "a/b c", "1", &Request{Inputs: x, BinaryOutput: out}, in)
			if want := (&Response{ModelName: "a/b c", ModelVersion: "1", Outputs: x}); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("got %+v, %v", got, err)
			}
		}
	}
	if _, err := c.Infer(t.Context(), "m", "1", &Request{Inputs: []Tensor{{Name: "x", Datatype: FP32, Shape: []int64{2}}}}, true); err == nil ||
		err.Error() != `input "x": FP32 of shape [2]: expected 2 elements of 4 bytes, got 0 bytes` {
		t.Errorf("a bad request of our own: %v", err)
	}
}

func TestClientTellsWhatTheServerSaid(t *testing.T) {
	answer := map[string]struct {
		status int
		body   string
	}{
		"/v2":                {200, `{"name":"s","version":"1","extensions":["binary_tensor_data"]}`},
		"/v2/health/live":    {200, ``},
		"/v2/health/ready":   {503, `{"ready":false,"error":"still loading"}`},
		"/v2/models/m":       {502, "<html>Bad Gateway</html>"},
		"/v2/models/n":       {200, "no JSON"},
		"/v2/models/o/ready": {404, ""},
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := answer[r.URL.Path]
		w.WriteHeader(a.status)
		_, _ = io.WriteString(w, a.body)
	}))
	defer server.Close()
	c := &Client{BaseURL: server.URL, HTTP: server.Client()}
	check := func(err error, status int, want string) {
		t.Helper()
		if err == nil || StatusOf(err) != status || !strings.Contains(err.Error(), want) {
			t.Errorf("got %d %v, want %d %s", StatusOf(err), err, status, want)
		}
	}
	if err := c.Live(t.Context()); err != nil {
		t.Error(err)
	}
	if m, err := c.Server(t.Context()); err != nil || m.Name != "s" {
		t.Errorf("got %+v, %v", m, err)
	}
	check(c.Ready(t.Context()), 503, "still loading")
	_, err := c.Metadata(t.Context(), "m", "")
	check(err, 502, "502 Bad Gateway: <html>Bad Gateway</html>")
	_, err = c.Metadata(t.Context(), "n", "")
	check(err, 0, "invalid character")
	check(c.ModelReady(t.Context(), "o", ""), 404, "404 Not Found")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Live(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
