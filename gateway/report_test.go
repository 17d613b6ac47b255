package gateway

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/oip"
)

// Report gives what a gateway measures to the test, when it wants any.
func (r *region) Report(ctx context.Context, m *pb.Samples) (*pb.ReportReply, error) {
	if r.reports == nil {
		return nil, status.Error(codes.Unimplemented, "this test asks for no reports")
	}
	select {
	case r.reports <- m:
	case <-ctx.Done():
	}
	return &pb.ReportReply{}, nil
}

// measured is one sample that a test waits for.
type measured struct {
	of, metric string
	ok         func(float64) bool
}

// await reads reports until each sample was in one as it is to be.
func (r *region) await(t *testing.T, all ...measured) {
	t.Helper()
	late := time.After(time.Minute)
	for len(all) > 0 {
		select {
		case m := <-r.reports:
			if m.Source != "g" {
				t.Fatalf("a report of %q", m.Source)
			}
			all = slices.DeleteFunc(all, func(x measured) bool {
				return slices.ContainsFunc(m.Samples, func(s *pb.Sample) bool { return s.Of == x.of && s.Metric == x.metric && x.ok(s.Value) })
			})
		case <-late:
			t.Fatalf("no report has %s of %s as it is to be", all[0].metric, all[0].of)
		}
	}
}

// TestReports has the servers told of requests that wait for a replica, are in flight, and wait at the replica; and that nothing
// does where nothing does.
func TestReports(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	w, _ := worker(t, func(rw http.ResponseWriter, _ *http.Request) {
		entered <- struct{}{}
		<-leave
		rw.Header().Set(oip.HeaderQueueTime, strconv.Itoa(40_000))
		_, _ = rw.Write([]byte(`{"model_name":"m","outputs":[]}`))
	})
	r := startRegion(t)
	r.reports = make(chan *pb.Samples)
	r.send(routesFor(nil, "-"+w))
	g, front := startGateway(t, r, nil)
	until(t, g, func(tb *table) bool { return tb.models["m"] != nil }) // else nothing is held
	none, some := func(v float64) bool { return v == 0 }, func(v float64) bool { return v > 0 }

	answered := make(chan error, 1)
	go func() {
		resp, err := http.Post(front.URL+"/v2/models/m/infer", "application/json", strings.NewReader("x"))
		if err == nil {
			err = resp.Body.Close()
		}
		answered <- err
	}()
	r.await(t, measured{"m", cluster.MetricHeld, some})
	r.send(routesFor(nil, w))
	<-entered
	r.await(t, measured{"alloc-0", cluster.MetricInFlight, some})
	close(leave)
	r.await(t, measured{"alloc-0", cluster.MetricQueueTime, func(ms float64) bool { return ms == 40 }})
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
	r.await(t,
		measured{"alloc-0", cluster.MetricInFlight, none}, measured{"alloc-0", cluster.MetricQueueTime, none}, measured{"m", cluster.MetricHeld, none})
}

func TestQueueTime(t *testing.T) {
	var q queue
	q.add("1000")
	q.add("3000")
	if ms, known := q.mean(1); ms != 2 || !known {
		t.Errorf("of two answers: %v, %v", ms, known)
	}
	if _, known := q.mean(1); known {
		t.Error("nothing was answered and something is in flight, but the time is known")
	}
	if ms, known := q.mean(0); ms != 0 || !known {
		t.Errorf("idle: %v, %v", ms, known)
	}
	q.add("") // an older worker
	if _, known := q.mean(0); known {
		t.Error("a worker that does not say is known to let nobody wait")
	}
}
