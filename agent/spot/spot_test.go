package spot

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// service is a metadata service: what it answers by path and query; a header that it must be asked with.
type service struct {
	*httptest.Server
	mu      sync.Mutex
	answers map[string]string
	changed chan struct{}
	broken  bool
	version int // of answers, the ETag
}

func newService(t *testing.T, header, value string) *service {
	s := &service{answers: map[string]string{}, changed: make(chan struct{})}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.RawQuery, "wait_for_change") {
			s.mu.Lock()
			changed := s.changed
			if r.URL.Query().Get("last_etag") != strconv.Itoa(s.version) {
				changed = nil
			}
			s.mu.Unlock()
			if changed != nil {
				select {
				case <-changed:
				case <-r.Context().Done():
					return
				}
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		path := r.URL.Path
		if v := r.URL.Query().Get("api-version"); v != "" {
			path += "?" + v
		}
		text, ok := s.answers[r.Method+" "+path]
		switch {
		case s.broken:
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.Method == http.MethodGet && r.Header.Get(header) != value && r.Header.Get(header) != s.answers["token"]:
			w.WriteHeader(http.StatusUnauthorized)
		case !ok:
			w.WriteHeader(http.StatusNotFound)
		default:
			w.Header().Set("ETag", strconv.Itoa(s.version))
			_, _ = w.Write([]byte(text))
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *service) set(f func(answers map[string]string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s.answers)
	s.version++
	close(s.changed)
	s.changed = make(chan struct{})
}

// watch gives the provider's notices.
func watch(t *testing.T, o Options) (Provider, <-chan *Notice, chan error) {
	t.Helper()
	o.Every = time.Millisecond
	failed := make(chan error, 1)
	o.Warn = func(err error) {
		select {
		case failed <- err:
		default:
		}
	}
	p, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	notices := make(chan *Notice, 100)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.Watch(ctx, func(n *Notice) { notices <- n })
	}()
	t.Cleanup(func() { cancel(); <-ended })
	if n := <-notices; n != nil {
		t.Fatalf("first notice %+v", n)
	}
	return p, notices, failed
}

func isSpot(t *testing.T, p Provider, want bool) {
	t.Helper()
	if is, err := p.Spot(t.Context()); err != nil || is != want {
		t.Errorf("spot: %v, %v, want %v", is, err, want)
	}
}

func TestAWS(t *testing.T) {
	s := newService(t, "X-aws-ec2-metadata-token", "one")
	s.set(func(a map[string]string) {
		a["PUT /latest/api/token"] = "one"
		a["GET /latest/meta-data/instance-life-cycle"] = "spot"
	})
	p, notices, failed := watch(t, Options{Provider: AWS, Endpoint: s.URL + "/"})
	isSpot(t, &aws{metadata: p.(*aws).metadata}, true)
	s.set(func(a map[string]string) {
		a["GET /latest/meta-data/events/recommendations/rebalance"] = `{"noticeTime": "2030-10-26T22:57:00Z"}`
	})
	if n := <-notices; n == nil || !n.At.IsZero() || !strings.Contains(n.Reason, "recommends") {
		t.Errorf("notice %+v", n)
	}
	s.mu.Lock()
	s.broken = true
	s.mu.Unlock()
	if err := <-failed; !strings.Contains(err.Error(), "503") {
		t.Errorf("warned of %v", err)
	}
	s.mu.Lock()
	s.broken = false
	s.mu.Unlock()
	s.set(func(a map[string]string) {
		a["GET /latest/meta-data/spot/instance-action"] = `{"action": "terminate", "time": "2030-09-18T08:22:00Z"}`
	})
	if n := <-notices; n == nil || !n.At.Equal(time.Date(2030, 9, 18, 8, 22, 0, 0, time.UTC)) || n.Reason != "AWS takes the spot instance: terminate" {
		t.Errorf("notice %+v", n)
	}
}

// TestAWSToken: a token that the service does not take any more is renewed.
func TestAWSToken(t *testing.T) {
	s := newService(t, "X-aws-ec2-metadata-token", "new")
	s.set(func(a map[string]string) {
		a["PUT /latest/api/token"] = "new"
		a["GET /latest/meta-data/instance-life-cycle"] = "on-demand"
	})
	p, err := Open(Options{Provider: AWS, Endpoint: s.URL})
	if err != nil {
		t.Fatal(err)
	}
	p.(*aws).token, p.(*aws).expires = "old", time.Now().Add(time.Hour)
	isSpot(t, p, false)
	s.set(func(a map[string]string) { a["PUT /latest/api/token"] = "wrong" })
	p.(*aws).token = ""
	if _, err := p.Spot(t.Context()); err == nil {
		t.Error("a token that nobody takes is no fault")
	}
}

func TestGCP(t *testing.T) {
	s := newService(t, "Metadata-Flavor", "Google")
	s.set(func(a map[string]string) {
		a["GET /computeMetadata/v1/instance/preempted"] = "FALSE"
		a["GET /computeMetadata/v1/instance/scheduling/preemptible"] = "TRUE"
	})
	p, notices, _ := watch(t, Options{Provider: GCP, Endpoint: s.URL})
	isSpot(t, p, true)
	before := time.Now()
	s.set(func(a map[string]string) { a["GET /computeMetadata/v1/instance/preempted"] = "TRUE" })
	if n := <-notices; n == nil || n.At.Before(before.Add(gcpNotice)) {
		t.Fatalf("notice %+v", n)
	}
	s.set(func(a map[string]string) { a["GET /computeMetadata/v1/instance/preempted"] = "FALSE" })
	if n := <-notices; n != nil {
		t.Errorf("notice %+v after it is withdrawn", n)
	}
}

func TestAzure(t *testing.T) {
	s := newService(t, "Metadata", "true")
	const events = "GET /metadata/scheduledevents?2020-07-01"
	event := func(kind, machine, at string) string {
		return `{"DocumentIncarnation": 3, "Events": [{"EventId": "e", "EventType": "` + kind + `", "EventStatus": "Scheduled", "ResourceType": "VirtualMachine",
			"Resources": ["` + machine + `"], "NotBefore": "` + at + `"}]}`
	}
	s.set(func(a map[string]string) {
		a[events] = event("Reboot", "me", "Mon, 19 Sep 2035 18:29:47 GMT")
		a["GET /metadata/instance/compute/name?2021-02-01"] = "me"
		a["GET /metadata/instance/compute/priority?2021-02-01"] = "Spot"
	})
	p, notices, failed := watch(t, Options{Provider: Azure, Endpoint: s.URL})
	isSpot(t, p, true)
	s.set(func(a map[string]string) { a[events] = event("Preempt", "another", "") })
	s.set(func(a map[string]string) { a[events] = event("Preempt", "me", "soon") })
	if err := <-failed; !strings.Contains(err.Error(), `"soon"`) {
		t.Errorf("warned of %v", err)
	}
	s.set(func(a map[string]string) { a[events] = event("Preempt", "me", "Wed, 19 Sep 2035 18:29:47 GMT") })
	if n := <-notices; n == nil || !n.At.Equal(time.Date(2035, 9, 19, 18, 29, 47, 0, time.UTC)) {
		t.Errorf("notice %+v", n)
	}
	s.set(func(a map[string]string) { a[events] = event("Preempt", "me", "") })
	if n := <-notices; n == nil || n.At.IsZero() || n.At.After(time.Now()) {
		t.Errorf("notice of what has begun: %+v", n)
	}
}

func TestOpen(t *testing.T) {
	for _, o := range []Options{{Provider: "oracle"}, {Provider: File}, {}} {
		if _, err := Open(o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}
