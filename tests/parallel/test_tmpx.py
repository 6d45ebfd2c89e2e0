import time, torch, pytest
from tests.harness.pool import run_ranks
from tests.parallel.attention_ranks import exactness
ENG=[("ring",{}),("ring",{"backward":"q"}),("ring",{"backward":"kv"}),("all_gather",{}),("all_gather",{"head_slices":2}),("rsa",{}),("ulysses",{}),("usp",{})]
def test_x():
    for name,opt in ENG:
        for P in (1,2,3,4):
            t=time.time()
            o=dict(opt)
            if name=="usp": o={"inner":{1:1,2:2,3:1,4:2}[P]}
            try:
                res=run_ranks(exactness,P,engine=name,options=o,num_tokens=29,every=4,dtype=torch.float64,timeout=100)
                bad=[(r,k,v) for r,w in enumerate(res) for k,v in w.items() if not v[0]<1e-10]
                print(name,o,P,round(time.time()-t,1),len(res[0]),max(v[0] for w in res for v in w.values()),bad[:2],flush=True)
            except Exception as e:
                print(name,o,P,"FAIL",str(e)[-1800:],flush=True)
