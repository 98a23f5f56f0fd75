"""The steps of the queue that must be one, as Lua run by Redis: look, then queue, take, keep, end, cancel or replay.

All get the same KEYS (see JobQueue), which share one hash slot. A job's own key is made in the script from KEYS[10]: which job it is,
`TAKE` learns from the stream only there.
"""

_COMMON = """
local streams, waiting, index, expiring = {KEYS[1], KEYS[2], KEYS[3]}, KEYS[4], KEYS[5], KEYS[6]
local counters, webhooks, dead = KEYS[7], KEYS[8], KEYS[9]
local over = {JOB_STATE_SUCCEEDED = true, JOB_STATE_FAILED = true, JOB_STATE_CANCELLED = true}
local function job(id) return KEYS[10] .. id end
local function items(id) return job(id) .. ':items' end
local function tell(id) redis.call('PUBLISH', job(id), '') end

-- Why there is no room, false if there is: as many jobs that have not ended, or as many bytes of their requests, as may be.
local function full(bytes, most_jobs, most_bytes)
  local jobs = 0
  for _, stream in ipairs(streams) do jobs = jobs + redis.call('XLEN', stream) end
  if jobs >= tonumber(most_jobs) then return 'full' end
  if (tonumber(redis.call('HGET', counters, 'bytes')) or 0) + bytes > tonumber(most_bytes) then return 'large' end
  return false
end

-- The end of the line of its class. Gives a number that grows with each job.
local function enqueue(id, class, bytes)
  local number = redis.call('HINCRBY', counters, 'queued', 1)
  local entry = redis.call('XADD', streams[class], '*', 'job', id)
  redis.call('ZADD', waiting, class * 1e12 + number, id)
  redis.call('HINCRBY', counters, 'bytes', bytes)
  redis.call('HSET', job(id), 'entry', entry, 'state', 'JOB_STATE_QUEUED', 'tries', 0)
  tell(id)
  return number
end

-- State, outcome, acknowledgement, webhook: all or nothing. What it asked for is kept for the dead alone, to replay it.
local function finish(id, state, outcome, now, ttl, keep_request)
  local key = job(id)
  local class, entry, bytes, webhook = unpack(redis.call('HMGET', key, 'class', 'entry', 'bytes', 'webhook'))
  redis.call('XACK', streams[tonumber(class)], 'workers', entry)
  redis.call('XDEL', streams[tonumber(class)], entry)
  redis.call('ZREM', waiting, id)
  redis.call('HINCRBY', counters, 'bytes', -tonumber(bytes))
  redis.call('HSET', key, 'state', state, 'outcome', outcome, 'finished', now, 'calls', 0)
  if not keep_request then redis.call('HDEL', key, 'request') end
  redis.call('EXPIRE', key, ttl)
  redis.call('EXPIRE', items(id), ttl)
  redis.call('ZADD', expiring, now + ttl, id)
  if webhook ~= '' then redis.call('ZADD', webhooks, now, id) end
  tell(id)
end
"""

# ARGV: id, fingerprint of what was asked, request, time, class, webhook, number of requests, whether a batch, tenant, most jobs,
# most bytes.
SUBMIT = (
    _COMMON
    + """
local id, fingerprint, request, now, class, webhook, total, batch, tenant, most_jobs, most_bytes = unpack(ARGV)
local asked, state = unpack(redis.call('HMGET', job(id), 'asked', 'state'))
if asked then return asked == fingerprint and state or 'other' end
local why = full(#request, most_jobs, most_bytes)
if why then return why end
if webhook ~= '' and redis.call('ZCARD', webhooks) >= tonumber(most_jobs) then return 'webhooks' end
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', expiring, '-inf', now, 'LIMIT', 0, 10)) do
  redis.call('ZREM', expiring, gone)
  redis.call('ZREM', index, gone)
end
redis.call('DEL', items(id))
redis.call('HSET', job(id), 'asked', fingerprint, 'request', request, 'created', now, 'class', class, 'webhook', webhook,
  'total', total, 'batch', batch, 'tenant', tenant, 'bytes', #request, 'run', 1)
redis.call('ZADD', index, enqueue(id, tonumber(class), #request), id)
redis.call('ZREM', expiring, id)
return 'JOB_STATE_QUEUED'
"""
)

# ARGV: consumer, idle time in ms after which another's job is taken (-1: none is), most deliveries.
# Gives `job` or `spent` (delivered too often already: not counted, not begun) with entry, class, id, request, number of this
# delivery, why the last one failed, when it was submitted, its tenant and the items it has; `dropped` with an entry whose job is over
# or unknown; or `none` with the last entries of the streams, to wait for the next.
TAKE = (
    _COMMON
    + """
local consumer, idle, most = unpack(ARGV)

local function deliver(class, found)
  local entry, id = found[1], ''
  for i = 1, #found[2], 2 do if found[2][i] == 'job' then id = found[2][i + 1] end end
  local state, mine, request, why, tries, created, tenant =
    unpack(redis.call('HMGET', job(id), 'state', 'entry', 'request', 'why', 'tries', 'created', 'tenant'))
  if not request or over[state] or mine ~= entry then
    redis.call('XACK', streams[class], 'workers', entry)
    redis.call('XDEL', streams[class], entry)
    return {'dropped', entry, class, id}
  end
  local kind, number = 'spent', tonumber(tries) + 1
  if number <= tonumber(most) then
    kind = 'job'
    redis.call('HSET', job(id), 'state', 'JOB_STATE_RUNNING', 'tries', number)
    redis.call('HINCRBY', job(id), 'deliveries', 1)
    redis.call('ZREM', waiting, id)
    tell(id)
  end
  return {kind, entry, class, id, request, number, why or '', created, tenant or '', redis.call('HKEYS', items(id))}
end

if tonumber(idle) >= 0 then
  for class, stream in ipairs(streams) do
    local cursor = '0-0'
    repeat  -- one call looks at ten pending entries
      local found = redis.call('XAUTOCLAIM', stream, 'workers', consumer, idle, cursor, 'COUNT', 1)
      if #found[2] > 0 then return deliver(class, found[2][1]) end
      cursor = found[1]
    until cursor == '0-0'
  end
end

local turn, order = tonumber(redis.call('HGET', counters, 'taken') or 0), {1, 2, 3}
if turn % 16 == 15 then order = {3, 1, 2} elseif turn % 4 == 3 then order = {2, 1, 3} end
for _, class in ipairs(order) do
  local found = redis.call('XREADGROUP', 'GROUP', 'workers', consumer, 'COUNT', 1, 'STREAMS', streams[class], '>')
  if found then
    redis.call('HINCRBY', counters, 'taken', 1)
    return deliver(class, found[1][2][1])
  end
end

local answer = {'none'}
for _, stream in ipairs(streams) do
  local facts = redis.call('XINFO', 'STREAM', stream)
  for i = 1, #facts, 2 do if facts[i] == 'last-generated-id' then answer[#answer + 1] = facts[i + 1] end end
end
return answer
"""
)

# ARGV: consumer, class, entry, idle time to set in ms. JUSTID: not a delivery. 0: the job has ended or is another's.
KEEP = (
    _COMMON
    + """
local consumer, class, entry, idle = unpack(ARGV)
local stream = streams[tonumber(class)]
local pending = redis.call('XPENDING', stream, 'workers', entry, entry, 1)
if #pending == 0 or pending[1][2] ~= consumer then return 0 end
redis.call('XCLAIM', stream, 'workers', consumer, 0, entry, 'IDLE', idle, 'JUSTID')
return 1
"""
)

# ARGV: id, entry, index, item, 1 for one that failed. An item stands once. Progress: deliveries are counted anew.
ITEM = (
    _COMMON
    + """
local id, entry, number, item, failed = unpack(ARGV)
local state, mine = unpack(redis.call('HMGET', job(id), 'state', 'entry'))
if state ~= 'JOB_STATE_RUNNING' or mine ~= entry then return 0 end
if redis.call('HSETNX', items(id), number, item) == 1 then
  redis.call('HSET', job(id), 'tries', 1)
  redis.call('HINCRBY', job(id), 'failed', failed)
  tell(id)
end
return 1
"""
)

# ARGV: id, state, outcome, time, seconds to keep it, why it is dead (empty: it is not), most dead. The first end stands: 0 for a later one.
END = (
    _COMMON
    + """
local id, state, outcome, now, ttl, why, most_dead = unpack(ARGV)
local before = redis.call('HGET', job(id), 'state')
if not before or over[before] then return 0 end
finish(id, state, outcome, tonumber(now), tonumber(ttl), why ~= '')
if why ~= '' then redis.call('XADD', dead, 'MAXLEN', most_dead, '*', 'job', id, 'why', why) end
return 1
"""
)

# ARGV: id, time, seconds to keep it. Gives the state it had; empty: unknown.
CANCEL = (
    _COMMON
    + """
local id, now, ttl = unpack(ARGV)
local state = redis.call('HGET', job(id), 'state')
if state and not over[state] then finish(id, 'JOB_STATE_CANCELLED', '', tonumber(now), tonumber(ttl), false) end
return state or ''
"""
)

# ARGV: id, its entry among the dead, most jobs, most bytes.
REPLAY = (
    _COMMON
    + """
local id, entry, most_jobs, most_bytes = unpack(ARGV)
local state, request, class = unpack(redis.call('HMGET', job(id), 'state', 'request', 'class'))
if not request or state ~= 'JOB_STATE_FAILED' then return 'gone' end
local why = full(#request, most_jobs, most_bytes)
if why then return why end
redis.call('HDEL', job(id), 'outcome', 'finished', 'why')
redis.call('HINCRBY', job(id), 'run', 1)
redis.call('PERSIST', job(id))
redis.call('PERSIST', items(id))
redis.call('ZREM', expiring, id)
enqueue(id, tonumber(class), #request)
redis.call('XDEL', dead, entry)
return 'JOB_STATE_QUEUED'
"""
)

# ARGV: consumer. One with entries stays: with its name they would be gone.
LEAVE = (
    _COMMON
    + """
for _, stream in ipairs(streams) do
  if #redis.call('XPENDING', stream, 'workers', '-', '+', 1, ARGV[1]) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, 'workers', ARGV[1])
  end
end
return 1
"""
)

# ARGV: time, until when nobody else may call. Gives id and number of the call, or nothing when none is due.
CALL_WEBHOOK = (
    _COMMON
    + """
local now, until_then = unpack(ARGV)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', webhooks, '-inf', now, 'LIMIT', 0, 10)) do
  if over[redis.call('HGET', job(id), 'state') or ''] then
    redis.call('ZADD', webhooks, until_then, id)
    return {id, redis.call('HINCRBY', job(id), 'calls', 1)}
  end
  redis.call('ZREM', webhooks, id)  -- forgotten, or replayed since: its next end calls
end
return {}
"""
)

# ARGV: id, the `until_then` it was called with, when to call again (empty: never). Nothing when another has it by now.
SETTLE_WEBHOOK = (
    _COMMON
    + """
local id, mine, again = unpack(ARGV)
if tonumber(redis.call('ZSCORE', webhooks, id) or -1) ~= tonumber(mine) then return 0 end
if again == '' then redis.call('ZREM', webhooks, id) else redis.call('ZADD', webhooks, again, id) end
return 1
"""
)
