package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/oip"
)

// fakeTokens is a server that knows tokens by hash.
type fakeTokens struct {
	mu    sync.Mutex
	of    map[string]*Holder
	err   error
	asked int
	block chan struct{}
}

func (f *fakeTokens) Resolve(ctx context.Context, hash string) (*Holder, error) {
	f.mu.Lock()
	f.asked++
	h, err, block := f.of[hash], f.err, f.block
	f.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return h, err
}

func (f *fakeTokens) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// asks gives the questions since the last call.
func (f *fakeTokens) asks() (n int) {
	f.set(func() { n, f.asked = f.asked, 0 })
	return n
}

func rulesOf(t *testing.T, text string) *acl.ACL {
	t.Helper()
	p, err := acl.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return acl.Compile(p)
}

func newCache(t *testing.T) (*TokenCache, *fakeTokens) {
	f := &fakeTokens{of: map[string]*Holder{
		acl.HashSecret("good"): {ACL: rulesOf(t, `model "m" { capabilities = ["infer"] }`)},
		acl.HashSecret("all"):  {ACL: acl.All},
		"":                     {ACL: new(acl.ACL)},
	}}
	return NewTokenCache(f, prometheus.NewRegistry()), f
}

func (c *TokenCache) status(secret, model string) int {
	err := c.Authorize(context.Background(), secret, model, acl.ModelInfer)
	if err == nil {
		return 200
	}
	return oip.StatusOf(err)
}

func TestTokenCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f := newCache(t)
		check := func(what, secret, model string, want, asks int) {
			t.Helper()
			if got := c.status(secret, model); got != want {
				t.Errorf("%s: %d, want %d", what, got, want)
			}
			if got := f.asks(); got != asks {
				t.Errorf("%s: %d questions, want %d", what, got, asks)
			}
		}
		check("first", "good", "m", 200, 1)
		check("again", "good", "m", 200, 0)
		check("another model", "good", "n", 403, 0)
		check("a manager", "all", "n", 200, 1)
		check("nobody", "", "m", 403, 1)
		check("unknown", "bad", "m", 403, 1)
		check("unknown again", "bad", "m", 403, 0)
		f.set(func() { f.of[acl.HashSecret("bad")] = &Holder{ACL: acl.All} })
		time.Sleep(unknownFresh)
		check("once it is made", "bad", "m", 200, 1)

		f.set(func() { delete(f.of, acl.HashSecret("good")) })
		time.Sleep(TokenFresh - unknownFresh - time.Nanosecond)
		check("deleted, not noticed yet", "good", "m", 200, 0)
		time.Sleep(time.Nanosecond)
		check("deleted", "good", "m", 403, 1)
		check("still", "good", "m", 403, 0)

		// While servers are down, known tokens go on for an hour, unknown ones do not.
		f.set(func() { f.err = errors.New("down") })
		time.Sleep(TokenFresh)
		check("known", "all", "m", 200, 1)
		check("no question at each request", "all", "m", 200, 0)
		time.Sleep(askPause)
		check("now and then one", "all", "m", 200, 1)
		check("unknown", "new", "m", 503, 1)
		check("unknown again", "new", "m", 503, 1)
		check("unknown before", "good", "m", 503, 1)
		time.Sleep(TokenStale - 2*TokenFresh - 2*askPause)
		check("almost an hour", "all", "m", 200, 1)
		time.Sleep(TokenFresh)
		check("over an hour", "all", "m", 503, 1)
		f.set(func() { f.err = nil })
		check("servers are back", "all", "m", 200, 1)

		f.set(func() {
			f.of[acl.HashSecret("brief")] = &Holder{ACL: acl.All, Expires: time.Now().Add(10 * time.Second)}
		})
		check("before its end", "brief", "m", 200, 1)
		time.Sleep(10 * time.Second)
		check("at its end", "brief", "m", 403, 0)
	})
}

// TestManyWaitForOneAnswer has many requests with one token ask once, and a client
// that goes away not take the answer along.
func TestManyWaitForOneAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f := newCache(t)
		f.set(func() { f.block = make(chan struct{}) })
		first, leave := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		var good atomic.Int32
		for i := range 50 {
			wg.Go(func() {
				ctx := context.Background()
				if i == 0 {
					ctx = first
				}
				if c.Authorize(ctx, "good", "m", acl.ModelInfer) == nil {
					good.Add(1)
				}
			})
		}
		synctest.Wait()
		leave()
		close(f.block)
		wg.Wait()
		if asks := f.asks(); asks != 1 || good.Load() != 50 {
			t.Errorf("%d questions, %d of 50 answered", asks, good.Load())
		}
	})
}

// TestGuessesAreBounded has strangers guess many tokens: a silent server is asked a
// bounded number at once, and what is known stays known.
func TestGuessesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f := newCache(t)
		if got := c.status("good", "m"); got != 200 {
			t.Fatal(got)
		}
		for i := range 3 * maxUnknown {
			c.status(fmt.Sprint("guess ", i), "m")
		}
		f.asks()
		if got := c.status("good", "m"); got != 200 || f.asks() != 0 || c.known.order.Len() != 1 || c.unknown.order.Len() != maxUnknown || len(c.unknown.by) != maxUnknown {
			t.Errorf("%d; %d known, %d unknown", got, c.known.order.Len(), c.unknown.order.Len())
		}
		f.set(func() { f.block = make(chan struct{}) })
		var wg sync.WaitGroup
		var refused atomic.Int32
		for i := range 10 * maxAsking {
			wg.Go(func() {
				if c.status(fmt.Sprint("slow ", i), "m") == 503 {
					refused.Add(1)
				}
			})
		}
		synctest.Wait()
		if asks := f.asks(); asks != maxAsking {
			t.Errorf("%d questions at once", asks)
		}
		wg.Wait()
		if refused.Load() != 10*maxAsking {
			t.Errorf("%d of %d refused with 503", refused.Load(), 10*maxAsking)
		}
		for i := range MaxTokens + 10 {
			f.set(func() { f.block, f.of[acl.HashSecret(fmt.Sprint("client ", i))] = nil, &Holder{ACL: acl.All} })
			if got := c.status(fmt.Sprint("client ", i), "m"); got != 200 {
				t.Fatal(got)
			}
		}
		if n := c.known.order.Len(); n != MaxTokens || len(c.known.by) != MaxTokens {
			t.Errorf("%d tokens are remembered", n)
		}
	})
}

// ResolveToken answers for the tokens that the test set.
func (r *region) ResolveToken(_ context.Context, req *pb.ResolveTokenRequest) (*pb.ResolveTokenReply, error) {
	if strings.Contains(req.SecretHash, "secret") {
		return nil, status.Error(codes.Internal, "the secret came itself")
	}
	if reply := r.tokens[req.SecretHash]; reply != nil {
		return reply, nil
	}
	return &pb.ResolveTokenReply{}, nil
}

// TestGatewayAsksForTokens sends requests through a gateway with access control, over
// real sockets, and then takes the servers away.
func TestGatewayAsksForTokens(t *testing.T) {
	r := startRegion(t)
	r.tokens = map[string]*pb.ResolveTokenReply{
		acl.HashSecret("secret-infer"): {Found: true, Rules: []string{`model "m" { capabilities = ["infer"] }`, `node { policy = "read" }`}},
		acl.HashSecret("secret-read"):  {Found: true, Rules: []string{`model "*" { policy = "read" }`}},
		acl.HashSecret("secret-all"):   {Found: true, Management: true},
		acl.HashSecret("secret-odd"):   {Found: true, Rules: []string{`modell "*" { policy = "read" }`}},
		"":                             {Found: true},
	}
	var seen atomic.Value
	worker := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen.Store(fmt.Sprint(r.Header))
		_, _ = io.WriteString(w, `{"outputs":[]}`)
	}))
	t.Cleanup(worker.Close)
	var tokens *TokenCache
	g, srv := startGateway(t, r, func(c *Config) {
		tokens = NewTokenCache(FleetTokens(c.Servers), c.Registry)
		c.Authorizer = tokens
	})
	r.send(routesFor(nil, strings.TrimPrefix(worker.URL, "http://")))
	until(t, g, func(t *table) bool { return t.models["m"] != nil })
	ask := func(method, path, header, value string) (int, string) {
		t.Helper()
		req, err := http.NewRequest(method, srv.URL+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(header, value)
		res, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(b)
	}
	const token, infer = "X-Nomad-Token", "/v2/models/m/infer"
	for _, test := range []struct {
		method, path, header, value string
		want                        int
		text                        string
	}{
		{"POST", infer, token, "secret-infer", 200, ""},
		{"POST", infer, "Authorization", "Bearer secret-infer", 200, ""},
		{"POST", "/v2/models/m/versions/1/infer", token, "secret-infer", 200, ""},
		{"GET", "/v2/models/m", token, "secret-infer", 200, ""},
		{"GET", "/v2/models/m", token, "secret-read", 200, ""},
		{"GET", "/v2/models/m/ready", token, "secret-read", 200, ""},
		{"POST", infer, token, "secret-read", 403, `{"error":"Permission denied"}`},
		{"POST", "/v1/models/m/classify", token, "secret-read", 403, `{"error":"Permission denied"}`},
		{"POST", "/v2/models/other/infer", token, "secret-infer", 403, `{"error":"Permission denied"}`},
		{"POST", "/v2/models/other/infer", token, "secret-all", 404, `{"error":"unknown model \"other\""}`},
		{"POST", infer, token, "", 403, `{"error":"Permission denied"}`},
		{"GET", "/v2/models/m", token, "", 403, `{"error":"Permission denied"}`},
		{"POST", infer, token, "secret-unknown", 403, `{"error":"ACL token not found"}`},
		{"POST", infer, token, "secret-odd", 503, ""},
		{"GET", "/v2", token, "", 200, ""},
		{"GET", "/v2/health/live", token, "", 200, ""},
	} {
		status, body := ask(test.method, test.path, test.header, test.value)
		if status != test.want || test.text != "" && body != test.text {
			t.Errorf("%s %s with %s: %d %s, want %d %s", test.method, test.path, test.value, status, body, test.want, test.text)
		}
	}
	if h := seen.Load().(string); strings.Contains(h, "secret") {
		t.Errorf("a worker was sent a token: %s", h)
	}
	r.stop()
	tokens.mu.Lock()
	for _, e := range tokens.known.by {
		e.Value.(*remembered).fresh = time.Time{}
	}
	tokens.mu.Unlock()
	if status, body := ask("POST", infer, token, "secret-infer"); status != 200 {
		t.Errorf("a known token with all servers down: %d %s", status, body)
	}
	if status, body := ask("POST", infer, token, "secret-new"); status != 503 || !strings.Contains(body, "cannot be checked") {
		t.Errorf("an unknown token with all servers down: %d %s", status, body)
	}
}
